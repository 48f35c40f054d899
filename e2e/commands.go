package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// prefix is what the names of all files and cgroups begin with that are made outside of a node.
const prefix = "connectors-csi-e2e-"

// exists reports whether there is a file or directory.
func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// isStatic reports whether a command runs without an interpreter, and so in an image that has nothing else.
func isStatic(command string) bool {
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

// run runs a command and returns an error with all its output if it fails.
func run(args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, output)
	}
	return nil
}

// cacheDir is where the node's programs and the pointer to the running node are kept.
func cacheDir() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "connectors-csi-e2e")
	return dir, os.MkdirAll(dir, 0o755)
}

// output returns what a command prints.
func output(args ...string) (string, error) {
	out, err := exec.Command(args[0], args[1:]...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
}
