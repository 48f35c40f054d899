// Package machine gives the tests what they need of the machine and Go modules don't provide.
package machine

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Need is something that the machine must have, and Debian's package of it.
type Need = struct {
	Name, Package string
	Present       bool
}

// Install makes sure that the machine has what is needed. As root on Debian and its derivatives it installs what is
// missing; otherwise it says what that is.
func Install(needs []Need) error {
	var names, packages []string
	for _, need := range needs {
		if !need.Present {
			names, packages = append(names, need.Name), append(packages, need.Package)
		}
	}
	if len(packages) == 0 {
		return nil
	}
	if !HasCommand("apt-get") || os.Geteuid() != 0 {
		return fmt.Errorf("this machine lacks %s: install it (on Debian: apt-get install %s) and try again",
			strings.Join(names, ", "), strings.Join(packages, " "))
	}
	unlock, err := Lock(filepath.Join(os.TempDir(), "connectors-csi-e2e-packages.lock"), "installing packages")
	if err != nil {
		return err
	}
	defer unlock()
	fmt.Println("Installing", strings.Join(packages, " "))
	install := append([]string{"install", "-y", "--no-install-recommends"}, packages...)
	if apt(install...) == nil {
		return nil
	}
	// A fresh machine has no package lists, an old one perhaps outdated ones.
	if err := apt("update"); err != nil {
		return err
	}
	return apt(install...)
}

// HasCommand reports whether there is a program of this name.
func HasCommand(name string) bool {
	_, err := exec.LookPath(name)
	return err == nil
}

// apt runs apt-get, without questions.
func apt(args ...string) error {
	cmd := exec.Command("apt-get", args...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, output)
	}
	return nil
}

// Lock waits until no other process holds the lock on a file, which is for what others are doing. The kernel releases
// it if this process dies.
func Lock(path, doing string) (unlock func() error, err error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return file.Close, nil
	}
	fmt.Println("Waiting for another process that is", doing+".")
	if err := unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	return file.Close, nil
}
