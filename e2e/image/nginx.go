package image

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"connectors-csi/e2e/machine"
)

// The image of examples/proxy: nginx and its JavaScript module, from packages of a newer Debian than this machine may
// have. They are unpacked, not installed, and the image has them with the libraries that belong to them.

// nginxPackages are those of nginxSuite that the image needs.
var nginxPackages = []string{"nginx", "libnginx-mod-http-js",
	"libc6", "libcrypt1", "libpcre2-8-0", "libqjs0", "libssl3t64", "libxml2-16", "libzstd1", "zlib1g"}

const (
	nginxSuite = "forky"

	nginxProgram = "usr/sbin/nginx"
	nginxModule  = "usr/lib/nginx/modules/ngx_http_js_module.so"
)

// FetchNginx unpacks the packages and returns where they are. Without Debian's tools the node lacks this one image.
func FetchNginx() (dir string, err error) {
	if !machine.HasCommand("apt-get") || !machine.HasCommand("dpkg-deb") {
		fmt.Println("Without apt-get and dpkg there is no image of nginx, and so no proxy of examples/proxy.")
		return "", nil
	}
	return machine.Packages{Suites: []string{nginxSuite}, Arch: runtime.GOARCH, Names: nginxPackages}.Unpack()
}

// NginxFiles returns the image's files, or none without the packages. The certificates in the file ca are those of the
// authorities that it trusts.
func NginxFiles(ca string) ([]File, error) {
	dir, err := FetchNginx() // has been called before, where there is a network
	if err != nil || dir == "" {
		return nil, err
	}
	trusted, err := os.ReadFile(ca)
	if err != nil {
		return nil, err
	}
	files := []File{
		{Name: "etc/nginx/", Mode: 0o755},
		{Name: "etc/passwd", Mode: 0o644, Content: []byte("root:x:0:0::/root:/bin/sh\nnginx:x:101:101::/:/bin/sh\n")},
		{Name: "etc/ssl/certs/ca-certificates.crt", Mode: 0o644, Content: trusted},
		{Name: "tmp/", Mode: 0o1777},
	}
	libraries, err := filepath.Glob(filepath.Join(dir, "usr/lib/*-linux-gnu/*.so*"))
	if err != nil {
		return nil, err
	}
	byName := map[string]string{}
	for _, path := range libraries {
		byName[filepath.Base(path)] = path
	}
	seen := map[string]bool{}
	var add func(path, name string) error
	add = func(path, name string) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files = append(files, File{Name: name, Mode: 0o755, Content: content})
		needed, loader, err := librariesOf(path)
		if err != nil {
			return err
		}
		if loader != "" {
			if err := add(byName[filepath.Base(loader)], loader[1:]); err != nil {
				return err
			}
		}
		for _, library := range needed {
			if byName[library] == "" {
				return fmt.Errorf("%s needs %s, which none of Debian's packages %q has", name, library, nginxPackages)
			}
			if err := add(byName[library], strings.TrimPrefix(byName[library], dir+"/")); err != nil {
				return err
			}
		}
		return nil
	}
	return files, errors.Join(add(filepath.Join(dir, nginxProgram), nginxProgram),
		add(filepath.Join(dir, nginxModule), nginxModule))
}

// librariesOf returns what a program or library needs to be loaded.
func librariesOf(path string) (libraries []string, loader string, err error) {
	binary, err := elf.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer binary.Close()
	for _, part := range binary.Progs {
		if part.Type == elf.PT_INTERP {
			name, err := io.ReadAll(part.Open())
			if err != nil {
				return nil, "", err
			}
			loader = strings.TrimRight(string(name), "\x00")
		}
	}
	libraries, err = binary.ImportedLibraries()
	return libraries, loader, err
}
