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

# Installs the packages that are missing, after naming them, and gets an emulator: see ensure_emulator.
ensure_packages() {
    local -A program_of=(
        [mmdebstrap]=mmdebstrap [e2fsprogs]=mke2fs [tar]=tar [xz-utils]=xz [zstd]=zstd [gcc]=cc [libc6-dev]=/usr/include/stdio.h
        [debian-archive-keyring]=/usr/share/keyrings/debian-archive-keyring.gpg
    )
    local package program missing=()
    for package in "${!program_of[@]}"; do
        program=${program_of[$package]}
        [ -e "$program" ] || command -v "$program" >/dev/null || PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || missing+=("$package")
    done
    [ ${#missing[@]} -eq 0 ] || install_packages "" "${missing[@]}"
    ensure_emulator
}

# Installs Debian packages, from a suite of their own or from the usual ones (""), unless somebody at the terminal does not want that.
install_packages() {
    local suite=$1
    shift
    say "this machine lacks these Debian packages: $*${suite:+ (from $suite)}"
    if [ -z "$assume_yes" ] && [ -t 0 ]; then
        local answer
        read -r -p "Install them now? [Y/n] " answer
        case $answer in [Nn]*) say "nothing was installed"; exit 125 ;; esac
    fi
    if [ -n "$suite" ] && ! grep -rqs "$suite" /etc/apt/sources.list /etc/apt/sources.list.d; then
        say "adding the suite $suite as /etc/apt/sources.list.d/lathe-$suite.sources"
        printf 'Types: deb\nURIs: http://deb.debian.org/debian\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' "$suite" |
            as_root tee "/etc/apt/sources.list.d/lathe-$suite.sources" >/dev/null
    fi
    local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -q --no-install-recommends)
    as_root "${apt[@]}" update >&2 || { say "apt-get update failed"; exit 125; }
    as_root "${apt[@]}" install ${suite:+-t "$suite"} "$@" >&2 || { say "apt-get install failed"; exit 125; }
}

# Puts QEMU 11 of Debian 13's backports first in PATH: unpacked into the cache with the libraries that it needs, not installed. Emulated
# hosts do a quarter more I/O with it than with 10.0, whose set of pending interrupts is not changed atomically when a nested guest is
# entered. Where it cannot be had an installed QEMU serves, 8 or newer: 7.2 panics the emulated host under nested load.
ensure_emulator() {
    local cache=${LATHE_TESTHOST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lathe-testhost}
    local emulator=$cache/emulator-$emulator_suite
    mkdir -p "$cache"
    if [ ! -x "$emulator/qemu-system-x86_64" ]; then
        # One at a time; whoever waited finds it made.
        (
            flock 9
            [ -x "$emulator/qemu-system-x86_64" ] || unpack_emulator "$emulator"
        ) 9>"$cache/emulator.lock" || say "no QEMU of $emulator_suite could be unpacked; an installed one is used"
    fi
    [ ! -x "$emulator/qemu-system-x86_64" ] || PATH=$emulator:$PATH
    export PATH
    if ! command -v qemu-system-x86_64 >/dev/null || [ "$(qemu_major)" -lt 8 ]; then
        install_packages bookworm-backports qemu-system-x86
    fi
}

emulator_suite=trixie-backports

unpack_emulator() {
    local emulator=$1 root=$1/root log=$1.log
    say "unpacking QEMU of $emulator_suite into $emulator"
    rm -rf "$emulator"
    mkdir -p "$root"
    printf 'Package: *\nPin: release n=%s\nPin-Priority: 900\n' "$emulator_suite" >"$emulator/preferences"
    # By way of an archive, so that the files are this user's, root or not.
    printf 'deb http://deb.debian.org/debian %s main\n' trixie "$emulator_suite" |
        mmdebstrap --variant=extract --include=qemu-system-x86,seabios,ipxe-qemu --aptopt='Apt::Install-Recommends "false"' \
            --setup-hook="mkdir -p \"\$1/etc/apt/preferences.d\"; cp '$emulator/preferences' \"\$1/etc/apt/preferences.d/suite\"" \
            trixie - - 2>"$log" | tar -x -C "$root" --exclude='./dev/*' 2>>"$log" || { tail -n 5 "$log" >&2; rm -rf "$emulator"; return 1; }
    cat >"$emulator/starter" <<EOF
#!/bin/sh
root='$root'
lib=\$root/usr/lib/x86_64-linux-gnu
exec "\$lib/ld-linux-x86-64.so.2" --library-path "\$lib" "\$root/usr/bin/qemu-system-x86_64" \\
    -L "\$root/usr/share/seabios" -L "\$root/usr/share/qemu" -L "\$root/usr/lib/ipxe/qemu" "\$@"
EOF
    chmod +x "$emulator/starter"
    "$emulator/starter" --version >>"$log" 2>&1 || { tail -n 5 "$log" >&2; rm -rf "$emulator"; return 1; }
    mv "$emulator/starter" "$emulator/qemu-system-x86_64"
    rm "$log"
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
