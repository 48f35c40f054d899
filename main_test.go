package main

// The tests of the driver. None of its parts is replaced: every test speaks gRPC to the driver's socket, as kubelet
// does, the driver speaks HTTPS to an API server of the test, which checks tokens and permissions, and what it
// mounts is looked at from outside. The test binary starts itself again in a mount namespace of its own, and in a
// user namespace as well where it is not root, so that it needs no privilege and leaves nothing behind.
//
// Tests run side by side. One without t.Parallel() runs alone: it measures limits of time, or memory or counts of the
// whole process, keeps the processors busy, or changes what all share.
//
// Beside this file, with TestMain and the process of the tests, stand
//
//	apiserver_test.go, node_test.go   what they are made with: the API server, the node, its Pods and volumes
//	process_test.go                   main.go: the process, kubelet's registration, metrics, the command render
//	http_test.go                      main.go: whoever reaches the port
//	preview_test.go                   main.go: hostile input, and whole clusters, for the command render
//	publish_test.go                   csi.go: the contract of a volume, and the errors that a user can meet
//	refresh_test.go                   kube.go: reads, the cache, tokens
//	watch_test.go, push_test.go       kube.go and csi.go: watches, and what comes of them
//	template_test.go                  render.go: templates and the documented ConnectorClasses
//	functions_test.go                 render.go: the functions of templates, numbers, what the preview decides
//	renderer_test.go                  render.go: the renderer, its death, its lies, turns
//	fairness_test.go                  kube.go, render.go, csi.go: who is next, what is cheap, what is kept
//	hostile_test.go                   render.go: what templates, objects and a renderer taken over can do
//	mount_test.go, memory_test.go     mount.go: the mount, kills, memory of volumes
//	mode_test.go                      mount.go and csi.go: file.mode, file.owner
//	docs_test.go, promises_test.go    README.md and docs; what they promise and no other file tries
//	fuzz_test.go, bench_test.go       random input; figures

import (
	"bytes"
	"cmp"
	"encoding/pem"
	"flag"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// roleKey is the environment variable that tells the test binary what it runs as.
	roleKey    = "CONNECTORS_CSI_TEST_ROLE"
	roleTests  = "tests"  // inside the namespaces
	roleWorker = "worker" // inside them too, and they are set up: a process of a fuzz test
	roleDriver = "driver" // the driver itself, by main()

	kubeletRoot  = "/run/k" // a shared mount, as kubelet's directory is; short, since it holds sockets
	containerDir = "/run/c" // where the tests mount volumes as a container runtime does

	testsAtOnce = "8" // since most of them wait more than they work

	apiAudience = "https://kubernetes.default.svc.cluster.local"
	driverUser  = "connectors-system/connectors-csi"
)

// times is how often a test does what finds more the longer it goes on: the second number where the tests are to find
// all that they can, as in CI, and else the first.
func times(short, long int) int {
	if longTests {
		return long
	}
	return short
}

var longTests = os.Getenv("CONNECTORS_CSI_LONG_TESTS") != ""

// ---- The module ----

func TestDirectDependencies(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("go.mod")
	must(t, err)
	var direct []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "\t") && !strings.Contains(line, "// indirect") {
			direct = append(direct, f[0])
		}
	}
	if want := []string{"github.com/Masterminds/sprig/v3", "github.com/container-storage-interface/spec",
		"golang.org/x/sys", "google.golang.org/grpc"}; !slices.Equal(direct, want) {
		t.Errorf("direct dependencies %v, not %v", direct, want)
	}
}

// ---- The API server, the node, its Pods and volumes ----

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == confineArgument || os.Args[1] == serveArgument) {
		os.Exit(startedAsRenderer())
	}
	switch os.Getenv(roleKey) {
	case roleDriver:
		main()
	case roleCrowd:
		besiege(os.Args[1])
	case roleTests:
		if err := setUpNamespace(); err != nil {
			fmt.Fprintln(os.Stderr, "setting up the mount namespace:", err)
			os.Exit(1)
		}
		os.Setenv(roleKey, roleWorker)
		if !slices.ContainsFunc(os.Args, func(a string) bool { return strings.HasPrefix(a, "-test.fuzz=") }) {
			flag.Set("test.parallel", testsAtOnce) // the default: a flag of the command is parsed later
		}
		os.Exit(runTests(m))
	case roleWorker:
		os.Exit(runTests(m))
	default:
		os.Exit(runInNamespace())
	}
}

// runInNamespace starts this test binary again in namespaces of its own, and returns its exit code.
func runInNamespace() int {
	runtime.LockOSThread() // the signal for the parent's death is one for the death of its thread
	again := func(flags uintptr) *exec.Cmd {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), roleKey+"="+roleTests)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags, Pdeathsig: syscall.SIGKILL}
		return cmd
	}
	cmd := again(syscall.CLONE_NEWNS)
	if os.Geteuid() != 0 || cmd.Start() != nil { // root of a container may not be allowed to either
		cmd = again(syscall.CLONE_NEWNS | syscall.CLONE_NEWUSER)
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
		if err := cmd.Start(); err != nil {
			fmt.Fprintln(os.Stderr,
				"the tests mount volumes: run them as root, or allow user namespaces (sysctl user.max_user_namespaces):", err)
			return 1
		}
	}
	cmd.Wait()
	return cmd.ProcessState.ExitCode()
}

// runTests runs the tests and returns the exit code. Drivers inside this process have logs of their own.
func runTests(m *testing.M) (code int) {
	var log lockedBuffer
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	code = m.Run()
	if text := log.String(); text != "" {
		fmt.Printf("--- FAIL: the global log has: %s\n", text)
		code = 1
	}
	return code
}

// setUpNamespace gives the tests a /run of their own, with the driver's ServiceAccount and, below it, a shared
// mount for kubelet's directory. All other mounts become private, so that nothing gets out.
func setUpNamespace() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	run, err := filepath.EvalSymlinks("/var/run")
	if err != nil {
		return err
	}
	for _, dir := range []string{"/run", run} { // mostly the same
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
	}
	for _, dir := range []string{kubeletRoot, containerDir, serviceAccountDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("tmpfs", kubeletRoot, "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	if err := unix.Mount("", kubeletRoot, "", unix.MS_SHARED, ""); err != nil {
		return err
	}
	server := httptest.NewTLSServer(nil) // every API server of httptest has the same certificate
	defer server.Close()
	return writeServiceAccount(serviceAccountDir, server)
}

// writeServiceAccount writes what kubelet mounts into the driver's container, with the API server's certificate.
func writeServiceAccount(dir string, server *httptest.Server) error {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	return cmp.Or(os.WriteFile(dir+"/ca.crt", ca, 0o644), os.WriteFile(dir+"/token", []byte(driverToken()+"\n"), 0o600))
}

// startCommand starts a program, as the driver starts its renderers: while none of this process's volumes is written.
func startCommand(cmd *exec.Cmd) error {
	writing.Lock()
	defer writing.Unlock()
	return cmd.Start()
}

// runCommand runs a program and returns all that it prints, unless the command has a place for it.
func runCommand(cmd *exec.Cmd) (output string, err error) {
	var out bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout, cmd.Stderr = &out, &out
	}
	if err := startCommand(cmd); err != nil {
		return "", err
	}
	err = cmd.Wait()
	return out.String(), err
}

// lockedBuffer is a buffer that many may write to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// reserve makes room for so many bytes.
func (b *lockedBuffer) reserve(bytes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.b.Grow(bytes)
}

// sorted goes over a table in the order of its keys, so that a test is the same each time.
func sorted[K cmp.Ordered, V any](table map[K]V) iter.Seq2[K, V] {
	return func(yield func(K, V) bool) {
		for _, key := range slices.Sorted(maps.Keys(table)) {
			if !yield(key, table[key]) {
				return
			}
		}
	}
}

// eventually waits until the condition holds.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if condition() {
			return
		}
	}
	t.Fatalf("never came true: %s", what)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
