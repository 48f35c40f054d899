package kernels

import (
	"bytes"
	_ "embed"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
)

//go:embed init.sh
var initScript []byte

// passwd has the users that tests look for in /etc/passwd.
const passwd = "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"

// readByTests are the files of the repository that tests read.
var readByTests = []string{".ci", "*.go", "*.md", "go.mod", "deploy.yaml", "docs", "e2e", "examples", "testdata"}

// makeInitramfs writes the archive that the kernel unpacks into memory: the driver, its tests, a shell and init.sh.
func (b boot) makeInitramfs(to, busybox string, tests []string) error {
	driver, driverTest := to+".driver", to+".driver.test"
	if err := b.build("build", "-o", driver, "."); err != nil {
		return err
	}
	var a cpio
	a.add("init", 0o755, initScript)
	a.addFile("bin/busybox", busybox)
	a.addFile("driver", driver)
	a.add("etc/passwd", 0o644, []byte(passwd))
	if !b.refuses {
		if err := b.build("test", "-c", "-o", driverTest, "."); err != nil {
			return err
		}
		a.addFile("driver.test", driverTest)
		a.add("etc/tests", 0o644, []byte(pattern(tests)))
		a.addTree("src", "..", readByTests)
	}
	archive, err := a.bytes()
	if err != nil {
		return err
	}
	return os.WriteFile(to, archive, 0o600)
}

// build runs go for the driver's module and the boot's processor. Its programs are static.
func (b boot) build(args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+b.arch)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, output)
	}
	return nil
}

// pattern is the regular expression of these tests alone, or of all if there are none.
func pattern(tests []string) string {
	if len(tests) == 0 {
		return "."
	}
	return "^(" + strings.Join(tests, "|") + ")$"
}

// cpio is an archive in the format newc, which the kernel reads: buffer-format.rst of its documentation.
type cpio struct {
	content bytes.Buffer
	known   map[string]bool // directories
	inode   int
	err     error // the first
}

// add adds a file, and the directories above it.
func (a *cpio) add(name string, mode fs.FileMode, content []byte) {
	if dir := path.Dir(name); dir != "." && !a.known[dir] {
		if a.known == nil {
			a.known = map[string]bool{}
		}
		a.known[dir] = true
		a.add(dir, fs.ModeDir|0o755, nil)
	}
	kind := 0o100000
	if mode.IsDir() {
		kind = 0o040000
	}
	a.inode++
	// magic, inode, mode, user, group, links, time, size, device (2), its own device (2), length of the name, checksum
	fmt.Fprintf(&a.content, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", a.inode, kind|int(mode.Perm()),
		0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.content.Write(content)
	a.pad()
}

// pad fills up to a multiple of four bytes.
func (a *cpio) pad() { a.content.Write(make([]byte, -a.content.Len()&3)) }

// addFile adds a file of this machine that can be executed.
func (a *cpio) addFile(name, from string) {
	content, err := os.ReadFile(from)
	if err != nil && a.err == nil {
		a.err = err
	}
	a.add(name, 0o755, content)
}

// addTree adds the files of a directory whose path begins with one of the patterns.
func (a *cpio) addTree(name, from string, patterns []string) {
	for _, pattern := range patterns {
		found, err := filepath.Glob(filepath.Join(from, pattern))
		for _, top := range found {
			err = filepath.WalkDir(top, func(file string, entry fs.DirEntry, err error) error {
				if err != nil || !entry.Type().IsRegular() {
					return err
				}
				relative, err := filepath.Rel(from, file)
				a.addFile(path.Join(name, relative), file)
				return err
			})
		}
		if err != nil && a.err == nil {
			a.err = err
		}
	}
}

// bytes ends the archive and returns it.
func (a *cpio) bytes() ([]byte, error) {
	a.add("TRAILER!!!", 0, nil)
	return a.content.Bytes(), a.err
}
