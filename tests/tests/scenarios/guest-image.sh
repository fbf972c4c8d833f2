#!/bin/sh
# guest-image RELEASE GUEST OUT: the built-in guest as an initramfs for kernel RELEASE, in the layout that lathe-guest expects, with
# busybox for the scenarios. lathed packs its own; this one keeps scenarios of the monitor independent of lathed.
set -eu
release=$1 guest=$2 out=$3
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
cd "$root"
mkdir -p bin dev etc lib/modules mnt proc root run sbin sys tmp
mknod dev/console c 5 1
cp "$guest" init
cp /bin/busybox bin/busybox
for name in sh dd cat echo mount umount sync blkdiscard sha256sum od ls tr wc grep; do ln -s busybox bin/$name; done
for name in bin/nproc bin/spin bin/uname sbin/modprobe sbin/poweroff sbin/reboot; do ln -s /init $name; done

name_of() { basename "$1" | sed 's/\.ko.*//; s/-/_/g'; }
pack() { # MODULE WHEN
    needs=
    for file in $(modprobe -S "$release" --show-depends "$1" | sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
        name=$(name_of "$file")
        case $file in
            *.xz) xz -dc "$file" >lib/modules/$name.ko ;;
            *) cp "$file" lib/modules/$name.ko ;;
        esac
        grep -q "^$name.ko " lib/modules/order || [ "$name" = "$1" ] || echo "$name.ko demand ${needs:--}" >>lib/modules/order
        [ "$name" = "$1" ] || needs=${needs:+$needs,}$name
        [ "$name" != "$1" ] || echo "$name.ko $2 ${needs:--}" >>lib/modules/order
    done
}
: >lib/modules/order
pack virtio_pci always
pack button always
pack virtio_blk virtio:2
pack virtio_net virtio:1
pack virtio_rng virtio:4
pack virtio_balloon virtio:5
pack vmw_vsock_virtio_transport virtio:19
pack virtio_mem virtio:24
pack ext4 demand
find . | busybox cpio -o -H newc >"$out.part" 2>/dev/null
mv "$out.part" "$out"
