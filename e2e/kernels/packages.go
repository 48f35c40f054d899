package kernels

import (
	"fmt"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/machine"
)

// fetch returns the paths of Debian's newest kernel of the boot's release and of a static busybox.
func (b boot) fetch() (vmlinuz, busybox string, _ error) {
	release := strings.ReplaceAll(b.release, ".", `\.`)
	dir, err := machine.Packages{
		Suites:  b.suites,
		Arch:    b.arch,
		Names:   []string{b.debian + "-" + release + `\.[0-9a-z.+]+(-[0-9]+)?-` + b.arch, "busybox-static"},
		Without: []string{"*/modules/*/kernel"},
	}.Unpack()
	if err != nil {
		return "", "", err
	}
	if vmlinuz, err = find(dir, "boot/vmlinuz-*", "usr/lib/modules/*/vmlinuz"); err != nil {
		return "", "", err
	}
	busybox, err = find(dir, "bin/busybox", "usr/bin/busybox")
	return vmlinuz, busybox, err
}

// find returns the one file of the directory that has one of the names.
func find(dir string, names ...string) (string, error) {
	var found []string
	for _, name := range names {
		paths, err := filepath.Glob(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		found = append(found, paths...)
	}
	if len(found) != 1 {
		return "", fmt.Errorf("%s has not one of %s, but %d", dir, strings.Join(names, ", "), len(found))
	}
	return found[0], nil
}
