package main

import (
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"connectors-csi/e2e/machine"
)

// What images are made of: programs of this machine.

// busyboxFiles returns busybox with a link for each of its commands.
func busyboxFiles() ([]file, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	binary, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	commands, err := machine.Output(path, "--list")
	if err != nil {
		return nil, err
	}
	files := []file{{name: "bin/busybox", mode: 0o755, content: binary}, {name: "tmp/", mode: 0o1777}}
	for command := range strings.FieldsSeq(commands) {
		if command != "busybox" {
			files = append(files, file{name: "bin/" + command, link: "busybox"})
		}
	}
	return files, nil
}

// clientFiles returns this machine's curl, and its git with all it needs to clone over HTTP.
func clientFiles() ([]file, error) {
	helpers, err := machine.Output("git", "--exec-path")
	if err != nil {
		return nil, err
	}
	git, err := exec.LookPath("git")
	if err != nil {
		return nil, err
	}
	curl, err := exec.LookPath("curl")
	if err != nil {
		return nil, err
	}
	programs, err := linkedFiles(curl, git, path.Join(helpers, "git-remote-http"))
	return append(programs,
		file{name: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0::/root:/bin/sh\n")},
		file{name: path.Join(helpers, "git")[1:], link: git}, // under this name git finds its own commands
		file{name: path.Join(helpers, "git-remote-https")[1:], link: "git-remote-http"},
		file{name: "usr/share/git-core/templates/", mode: 0o755},
	), err
}

// linkedFiles returns programs of this machine, and the libraries that they need.
func linkedFiles(programs ...string) (files []file, _ error) {
	seen := map[string]bool{}
	for _, program := range programs {
		// "\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)", "\t/lib64/ld-linux-x86-64.so.2 (0x…)"
		libraries, err := machine.Output("ldd", program)
		if err != nil {
			return nil, err
		}
		for _, name := range append(absolutePaths(libraries), program) {
			if seen[name] {
				continue
			}
			seen[name] = true
			content, err := os.ReadFile(name)
			if err != nil {
				return nil, err
			}
			files = append(files, file{name: name[1:], mode: 0o755, content: content})
		}
	}
	return files, nil
}

func absolutePaths(text string) []string {
	return slices.DeleteFunc(strings.Fields(text), func(word string) bool { return !filepath.IsAbs(word) })
}
