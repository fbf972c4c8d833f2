# Shared by tests/testhost, tests/run and tests/demo: installs what is missing, builds the harness. Sourced, not run.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
harness_target=x86_64-unknown-linux-gnu

say() { echo "${0##*/}: $*" >&2; }

# Puts the options --yes and -y out of the way; everything else stays in "${arguments[@]}".
take_yes() {
    assume_yes=
    arguments=()
    while [ $# -gt 0 ]; do
        case $1 in
            --yes | -y) assume_yes=1 ;;
            --) arguments+=("$@"); break ;;
            *) arguments+=("$1") ;;
        esac
        shift
    done
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Installs the packages that are missing, after naming them. QEMU must be 8 or newer: 7.2 panics the emulated host
# under nested load. Debian 12 has it in its backports suite, which is added if no source names it.
ensure_packages() {
    local -A program_of=(
        [mmdebstrap]=mmdebstrap [e2fsprogs]=mke2fs [tar]=tar [xz-utils]=xz [zstd]=zstd [gcc]=cc [libc6-dev]=/usr/include/stdio.h
        [debian-archive-keyring]=/usr/share/keyrings/debian-archive-keyring.gpg
    )
    local package program missing=() backports=
    for package in "${!program_of[@]}"; do
        program=${program_of[$package]}
        [ -e "$program" ] || command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$package")
    done
    if ! command -v qemu-system-x86_64 >/dev/null || [ "$(qemu_major)" -lt 8 ]; then
        backports=1
    fi
    [ ${#missing[@]} -gt 0 ] || [ -n "$backports" ] || return 0

    say "this machine lacks these Debian packages: ${missing[*]}${backports:+ qemu-system-x86 (from bookworm-backports)}"
    if [ -z "$assume_yes" ] && [ -t 0 ]; then
        local answer
        read -r -p "Install them now? [Y/n] " answer
        case $answer in [Nn]*) say "nothing was installed"; exit 125 ;; esac
    fi
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends)
    if [ -n "$backports" ] && ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
        say "adding the suite bookworm-backports as /etc/apt/sources.list.d/lathe-bookworm-backports.sources"
        printf 'Types: deb\nURIs: http://deb.debian.org/debian\nSuites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' |
            as_root tee /etc/apt/sources.list.d/lathe-bookworm-backports.sources >/dev/null
    fi
    as_root "${apt[@]}" update >&2 || { say "apt-get update failed"; exit 125; }
    if [ ${#missing[@]} -gt 0 ]; then
        as_root "${apt[@]}" install "${missing[@]}" >&2 || { say "apt-get install failed"; exit 125; }
    fi
    if [ -n "$backports" ]; then
        as_root "${apt[@]}" install -t bookworm-backports qemu-system-x86 >&2 || { say "apt-get install failed"; exit 125; }
    fi
}

qemu_major() {
    qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9]*\)\..*/\1/p'
}

ensure_cargo() {
    command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH
    command -v cargo >/dev/null && return 0
    say "there is no cargo on this machine. Get Rust 1.88 or newer, for example by"
    say "    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt"
    exit 125
}

# Builds the harness and sets LATHE_TESTHOST_BIN. It is linked statically, because the same program is the command
# agent inside the hosts. A target folder of its own keeps it apart from other builds and their flags.
build_harness() {
    export LATHE_TESTHOST_ROOT=$root
    [ -z "${LATHE_TESTHOST_BIN:-}" ] || return 0
    local target=$root/target/testhost
    (cd "$root" && CARGO_TARGET_DIR=$target RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' \
        cargo build --quiet --target $harness_target -p lathe-tests --bins >&2) || { say "the harness does not build"; exit 125; }
    export LATHE_TESTHOST_BIN=$target/$harness_target/debug/testhost
}
