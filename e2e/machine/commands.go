package machine

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Prefix is what the names of all files and cgroups begin with that are made outside of a node.
const Prefix = "connectors-csi-e2e-"

// Exists reports whether there is a file or directory.
func Exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// IsStatic reports whether a command runs without an interpreter, and so in an image that has nothing else.
func IsStatic(command string) bool {
	path, err := exec.LookPath(command)
	if err != nil {
		return false
	}
	file, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer file.Close()
	return file.Section(".interp") == nil
}

// Run runs a command and returns an error with all its output if it fails.
func Run(args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, output)
	}
	return nil
}

// CacheDir is where the node's programs and the pointer to the running node are kept.
func CacheDir() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "connectors-csi-e2e")
	return dir, os.MkdirAll(dir, 0o755)
}

// Output returns what a command prints.
func Output(args ...string) (string, error) {
	out, err := exec.Command(args[0], args[1:]...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}
