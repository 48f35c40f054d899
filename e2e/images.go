package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// The node reaches no registry. Every image that a test needs is written here, as the tar archive that
// `docker save` writes, and imported under the name by which manifests refer to it.

const (
	pauseImage   = "localhost/pause:1"
	clientImage  = "localhost/client:1"         // busybox, git and curl
	upgradeImage = "localhost/connectors-csi:2" // the driver in another image than deploy.yaml names
)

type image struct {
	name       string
	entrypoint []string
	files      []file
}

// file is one entry of an image's only layer. A name that ends with "/" is a directory.
type file struct {
	name    string
	mode    int64
	content []byte
	link    string // the target, for a symbolic link
}

// importImages gives containerd the images of the driver, of the README's Pod and of the tests.
func (n *Node) importImages() error {
	driverName, err := imageIn("../deploy.yaml")
	if err != nil {
		return err
	}
	readmeName, err := imageIn("../README.md")
	if err != nil {
		return err
	}
	binary, err := os.ReadFile(n.path("connectors-csi"))
	if err != nil {
		return err
	}
	driver := []file{{name: "connectors-csi", mode: 0o755, content: binary}}
	busybox, err := busyboxFiles()
	if err != nil {
		return err
	}
	clients, err := clientFiles()
	if err != nil {
		return err
	}
	for _, image := range []image{
		// A Pod's sandbox needs a process that does nothing, to hold the Pod's namespaces.
		{pauseImage, []string{"/bin/tail", "-f", "/dev/null"}, busybox},
		{readmeName, nil, busybox},
		{clientImage, nil, slices.Concat(busybox, clients)},
		{driverName, []string{"/connectors-csi"}, driver},
		{upgradeImage, []string{"/connectors-csi"}, append(driver, file{name: "2", mode: 0o444})},
	} {
		if err := importImage(image); err != nil {
			return fmt.Errorf("image %s: %w", image.name, err)
		}
	}
	return nil
}

var imageField = regexp.MustCompile(`(?m)^[ -]*image: *"?([^\s"]+)`)

// imageIn returns the one image that the manifests in a file name.
func imageIn(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	var names []string
	for _, match := range imageField.FindAllStringSubmatch(string(content), -1) {
		names = append(names, match[1])
	}
	if names = slices.Compact(names); len(names) != 1 {
		return "", fmt.Errorf("%s: exactly one image is expected, it names %q", path, names)
	}
	return names[0], nil
}

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
	commands, err := output(path, "--list")
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
	helpers, err := output("git", "--exec-path")
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
	files := []file{
		{name: "etc/passwd", mode: 0o644, content: []byte("root:x:0:0::/root:/bin/sh\n")},
		{name: path.Join(helpers, "git")[1:], link: git}, // under this name git finds its own commands
		{name: "usr/share/git-core/templates/", mode: 0o755},
	}
	seen := map[string]bool{}
	for _, program := range []string{curl, git, path.Join(helpers, "git-remote-http")} {
		// "\tlibz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x…)", "\t/lib64/ld-linux-x86-64.so.2 (0x…)"
		libraries, err := output("ldd", program)
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

// importImage hands an image to containerd, in the namespace that Kubernetes uses.
func importImage(image image) error {
	archive, err := image.archive()
	if err != nil {
		return err
	}
	cmd := exec.Command("ctr", "-n", "k8s.io", "images", "import", "-")
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("ctr images import: %w: %s", err, out)
	}
	return nil
}

// archive returns the image in the format of `docker save`: a manifest, a configuration, a layer.
func (i image) archive() ([]byte, error) {
	layer, err := tarball(i.files)
	if err != nil {
		return nil, err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": i.entrypoint, "Env": []string{"PATH=/usr/bin:/bin"}},
		"rootfs": map[string]any{
			"type":     "layers",
			"diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))},
		},
	})
	if err != nil {
		return nil, err
	}
	manifest, err := json.Marshal([]map[string]any{{
		"Config": "config.json", "RepoTags": []string{i.name}, "Layers": []string{"layer.tar"},
	}})
	if err != nil {
		return nil, err
	}
	return tarball([]file{
		{name: "manifest.json", mode: 0o644, content: manifest},
		{name: "config.json", mode: 0o644, content: config},
		{name: "layer.tar", mode: 0o644, content: layer},
	})
}

func tarball(files []file) ([]byte, error) {
	var buffer bytes.Buffer
	archive := tar.NewWriter(&buffer)
	for _, f := range files {
		header := &tar.Header{Name: f.name, Mode: f.mode, Size: int64(len(f.content)), Linkname: f.link}
		switch {
		case f.link != "":
			header.Typeflag = tar.TypeSymlink
			header.Mode = 0o777
		case strings.HasSuffix(f.name, "/"):
			header.Typeflag = tar.TypeDir
		}
		if err := archive.WriteHeader(header); err != nil {
			return nil, err
		}
		if _, err := archive.Write(f.content); err != nil {
			return nil, err
		}
	}
	err := archive.Close()
	return buffer.Bytes(), err
}
