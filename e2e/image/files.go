package image

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

// BusyboxFiles returns busybox with a link for each of its commands.
func BusyboxFiles() ([]File, error) {
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
	files := []File{{Name: "bin/busybox", Mode: 0o755, Content: binary}, {Name: "tmp/", Mode: 0o1777}}
	for command := range strings.FieldsSeq(commands) {
		if command != "busybox" {
			files = append(files, File{Name: "bin/" + command, Link: "busybox"})
		}
	}
	return files, nil
}

// ClientFiles returns this machine's curl, and its git with all it needs to clone over HTTP.
func ClientFiles() ([]File, error) {
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
	programs, err := LinkedFiles(curl, git, path.Join(helpers, "git-remote-http"))
	return append(programs,
		File{Name: "etc/passwd", Mode: 0o644, Content: []byte("root:x:0:0::/root:/bin/sh\n")},
		File{Name: path.Join(helpers, "git")[1:], Link: git}, // under this name git finds its own commands
		File{Name: path.Join(helpers, "git-remote-https")[1:], Link: "git-remote-http"},
		File{Name: "usr/share/git-core/templates/", Mode: 0o755},
	), err
}

// LinkedFiles returns programs of this machine, and the libraries that they need.
func LinkedFiles(programs ...string) (files []File, _ error) {
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
			files = append(files, File{Name: name[1:], Mode: 0o755, Content: content})
		}
	}
	return files, nil
}

func absolutePaths(text string) []string {
	return slices.DeleteFunc(strings.Fields(text), func(word string) bool { return !filepath.IsAbs(word) })
}
