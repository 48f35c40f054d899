package node

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/machine"
)

// nodeNeeds are those of a node.
func nodeNeeds() []machine.Need {
	return []machine.Need{
		{"a C compiler", "gcc", machine.HasCommand("gcc")},
		{"the C library's headers", "libc6-dev", machine.Exists("/usr/include/stdlib.h")},
		{"pkg-config", "pkg-config", machine.HasCommand("pkg-config")},
		{"libseccomp's headers", "libseccomp-dev", exec.Command("pkg-config", "--exists", "libseccomp").Run() == nil},
		{"a static busybox", "busybox-static", machine.IsStatic("busybox")},
		{"mount", "mount", machine.HasCommand("mount")},
		{"nsenter", "util-linux", machine.HasCommand("nsenter")},
		{"git", "git", machine.HasCommand("git")},
		{"curl", "curl", machine.HasCommand("curl")},
		{"nft", "nftables", machine.HasCommand("nft")},
	}
}

// releaseModule returns the directory of the module that builds the release, or "" for go.mod's own.
func releaseModule() (string, error) {
	release := os.Getenv(cluster.EnvRelease)
	if release == "" {
		return "", nil
	}
	entries, err := os.ReadDir("kubernetes")
	if err != nil {
		return "", err
	}
	var known []string
	for _, entry := range entries {
		if entry.Name() == release {
			return filepath.Join("kubernetes", release), nil
		}
		known = append(known, entry.Name())
	}
	return "", fmt.Errorf("unknown Kubernetes release %q: there are %s, and without it the default",
		release, strings.Join(known, ", "))
}

// linkTools makes a directory with links to the node's programs. Those of another Kubernetes release take the place of
// the default's. The same for all are etcd, containerd, runc, the network's, CoreDNS, kube-proxy, since 1.30 has its
// nftables mode behind a gate only, and kubectl, since the tests use what only a newer one has (1.30 has no wait
// --for=create).
func linkTools(dir, module string) error {
	modules := []toolModule{{".", "k8s.io/kubernetes"}, {"coredns", "github.com/coredns/coredns"}}
	if module != "" {
		modules = append(modules, toolModule{module, "k8s.io/kubernetes"})
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, module := range modules {
		tools, err := module.build()
		if err != nil {
			return err
		}
		programs, err := filepath.Glob(filepath.Join(tools, "*"))
		if err != nil {
			return err
		}
		link := append([]string{"ln", "-sf", "-t", dir, "--"}, programs...)
		if err := machine.Run(link...); err != nil {
			return err
		}
	}
	return nil
}

// toolModule is a directory with a module that lists programs as tools, and the path of the main one's module. CoreDNS
// has a module of its own, since what it requires would make another Kubernetes than the released one.
type toolModule struct{ dir, path string }

// build builds the programs that the module lists as tools, unless an earlier run did, and returns their
// directory. Its name depends on all that they are built from, so it never holds outdated programs.
func (m toolModule) build() (string, error) {
	version, err := machine.Output("go", "-C", m.dir, "list", "-m", "-f", "{{.Version}}", m.path)
	if err != nil {
		return "", fmt.Errorf("%w\n(start it with: go -C e2e run .)", err)
	}
	// seccomp: runc refuses every Pod without it. gitVersion: what the node says its version is.
	flags := []string{"-tags", "seccomp", "-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion=" + version}
	hash := sha256.New()
	for _, file := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join(m.dir, file))
		if err != nil {
			return "", err
		}
		hash.Write(content)
	}
	fmt.Fprintln(hash, flags, runtime.Version(), runtime.GOARCH)
	cache, err := machine.CacheDir()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, fmt.Sprintf("%x", hash.Sum(nil)[:8]))

	unlock, err := machine.Lock(filepath.Join(cache, "lock"), "building")
	if err != nil {
		return "", err
	}
	defer unlock()
	if machine.Exists(dir) {
		return dir, nil
	}
	// All or nothing: the directory gets its name when it is complete.
	unfinished := dir + ".unfinished"
	if err := os.RemoveAll(unfinished); err != nil {
		return "", err
	}
	if err := m.install(version, unfinished, flags); err != nil {
		return "", err
	}
	return dir, os.Rename(unfinished, dir)
}

// install runs go install for all of the module's tools and prints how far it is.
func (m toolModule) install(version, dir string, flags []string) error {
	fmt.Println("Building", m.path, version, "and what else the node needs: 2 (CoreDNS) to 15 minutes on two cores, once.")
	began := time.Now()
	list := append(append([]string{"go", "-C", m.dir, "list"}, flags...), "-deps", "tool")
	packages, err := machine.Output(list...)
	if err != nil {
		return err
	}
	total := strings.Count(packages, "\n") + 1
	cmd := exec.Command("go", append(append([]string{"-C", m.dir, "install", "-v"}, flags...), "tool")...)
	cmd.Env = append(os.Environ(), "GOBIN="+dir)
	stderr, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var messages strings.Builder // -v prints the path of each package as it is compiled; more if it fails
	last := began
	built := 0
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		messages.WriteString(lines.Text() + "\n")
		built++
		if time.Since(last) > 10*time.Second {
			last = time.Now()
			fmt.Printf("  %s: %d of at most %d packages, now %s\n",
				time.Since(began).Round(time.Second), built, total, lines.Text())
		}
	}
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("go install: %w\n%s", err, messages.String())
	}
	fmt.Println("  built after", time.Since(began).Round(time.Second))
	return nil
}
