package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"connectors-csi/e2e/machine"
)

// pointTo makes a node the one that ExecKubectl finds.
func pointTo(dir string, init int) error {
	link, err := runningNode()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "pid"), fmt.Append(nil, init), 0o644); err != nil {
		return err
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(dir, link)
}

// runningNode is the name of a link to the directory of the node that was started last.
func runningNode() (string, error) {
	cache, err := machine.CacheDir()
	return filepath.Join(cache, "node"), err
}

// ExecKubectl becomes kubectl in the running node's network.
func ExecKubectl(args []string) error {
	dir, err := runningNode()
	if err != nil {
		return err
	}
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	network := fmt.Sprintf("/proc/%s/ns/net", pid)
	if err != nil || !machine.Exists(network) {
		return errors.New("no node is running; start one with: go -C e2e run . up")
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return err
	}
	os.Setenv("KUBECONFIG", filepath.Join(dir, "admin.kubeconfig"))
	command := append([]string{"nsenter", "--net=" + network, filepath.Join(dir, "bin", "kubectl")}, args...)
	return syscall.Exec(nsenter, command, os.Environ())
}
