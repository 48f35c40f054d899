package kernels

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/machine"
)

const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg" // signs the lists of packages

// fetch makes sure that Debian's newest kernel of the boot's release and a static busybox are there, and returns their
// paths. They are downloaded with lists of their own, and neither they nor these are the machine's.
func (b boot) fetch() (vmlinuz, busybox string, _ error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", "", err
	}
	dir := filepath.Join(cache, "connectors-csi-e2e", fmt.Sprintf("linux-%s-%s", b.release, b.arch))
	vmlinuz, busybox = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "busybox")
	if _, err := os.Stat(dir); err == nil {
		return vmlinuz, busybox, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", "", err
	}
	if !machine.HasCommand("apt-get") || !machine.HasCommand("dpkg-deb") {
		return "", "", errors.New("kernels are packages of Debian, and this machine lacks apt-get and dpkg-deb to fetch them with")
	}
	work, err := os.MkdirTemp(filepath.Dir(dir), "linux-")
	if err != nil {
		return "", "", err
	}
	defer os.RemoveAll(work)
	cmd := exec.Command("sh", "-euc", fetchScript, "sh", work, keyring, b.arch, strings.ReplaceAll(b.release, ".", `\.`), dir)
	cmd.Args = append(cmd.Args, b.suites...)
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", "", fmt.Errorf("fetching Linux %s for %s: %w\n%s", b.release, b.arch, err, output)
	}
	return vmlinuz, busybox, nil
}

// fetchScript puts vmlinuz and busybox into a directory. Where there are packages linux-binary-… they have the kernel,
// and those named linux-image-… not. The machine's own packages and processor are nothing to apt-get here.
const fetchScript = `
	cd "$1"; keyring=$2; arch=$3; release=$4; dir=$5; shift 5
	mirror() { apt-get indextargets --format '$(LABEL) $(REPO_URI)' | awk '$1 == "Debian" { print $2; exit }'; }
	[ "$(mirror)" ] || apt-get -q update
	mkdir -p lists/partial archives/partial unpacked done
	for suite; do
		echo "deb [signed-by=$keyring] $(mirror) $suite main"
	done >sources.list
	apt() {
		command=$1; shift
		"$command" -q -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=- \
			-o Dir::State::Lists="$PWD/lists" -o Dir::State::status=/dev/null -o Dir::Cache="$PWD" \
			-o APT::Sandbox::User=root -o APT::Architecture="$arch" -o APT::Architectures::="$arch" "$@"
	}
	apt apt-get update
	kernel=$(apt apt-cache search --names-only "^linux-(image|binary)-$release\.[0-9a-z.+]+(-[0-9]+)?-$arch\$" |
		awk '{ print $1 }' | sort -t- -k3V -k2,2r | tail -n 1)
	[ "$kernel" ] || { echo "there is no such package (any more) in: $*"; exit 1; }
	apt apt-get download "$kernel" busybox-static
	for package in ./*.deb; do
		dpkg-deb --fsys-tarfile "$package" | tar -x -C unpacked --wildcards './boot/vmlinuz*' './*/vmlinuz' '*bin/busybox' ||:
	done
	mv unpacked/boot/vmlinuz* done/vmlinuz || mv unpacked/usr/lib/modules/*/vmlinuz done/vmlinuz
	mv unpacked/bin/busybox done/busybox || mv unpacked/usr/bin/busybox done/busybox
	mv done "$dir"`
