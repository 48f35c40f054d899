// Package examples tries what people copy: the classes below examples, and what docs/templates.md says of quoting. The command
// render makes the files, as a user would, and the tool that they are for reads them. No Kubernetes is needed.
package examples

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/elazarl/goproxy"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"connectors-csi/e2e/machine"
)

// needs are those that the machine must have. Go modules bring kubectl and crane.
func needs() []machine.Need {
	hasModules := exec.Command("python3", "-c", "import yaml, tomllib").Run() == nil
	return []machine.Need{
		{"git", "git", machine.HasCommand("git")},
		{"curl", "curl", machine.HasCommand("curl")},
		{"npm", "npm", machine.HasCommand("npm")},
		{"pip", "python3-pip", machine.HasCommand("pip3")},
		{"Maven", "maven", machine.HasCommand("mvn")},
		{"keytool", "default-jre-headless", machine.HasCommand("keytool")},
		{"skopeo", "skopeo", machine.HasCommand("skopeo")},
		{"xmllint", "libxml2-utils", machine.HasCommand("xmllint")},
		{"the system's CAs", "ca-certificates", exec.Command("test", "-e", systemCAs).Run() == nil},
		{"Python 3.11 with PyYAML", "python3-yaml", hasModules},
	}
}

// systemCAs is the file of the CAs that the system trusts.
const systemCAs = "/etc/ssl/certs/ca-certificates.crt"

// programsKey is the environment variable that has the directory with the programs that the tests build, and says that
// this process runs in a network of its own.
const programsKey = "CONNECTORS_CSI_EXAMPLES_PROGRAMS"

// programs is that directory.
var programs = os.Getenv(programsKey)

// The tests run in a network and with a table of hosts of their own: there, ports 80 and 443 are free, every name is
// that of the proxy, and what goes around it reaches nothing.
func TestMain(m *testing.M) {
	if programs == "" {
		code, err := runInNamespaces()
		if err != nil {
			fmt.Fprintln(os.Stderr, "examples:", err)
			code = 1
		}
		os.Exit(code)
	}
	if err := errors.Join(setUpNetwork(), startProxies(), trustProxy()); err != nil {
		fmt.Fprintln(os.Stderr, "examples: setting up the network:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runInNamespaces builds the programs, starts this test binary again in namespaces of its own, and returns its exit
// code.
func runInNamespaces() (int, error) {
	if err := machine.Install(needs()); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "connectors-csi-examples-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	for _, build := range []*exec.Cmd{
		exec.Command("go", "-C", "../..", "build", "-o", dir, "."),
		exec.Command("go", "build", "-o", dir, "k8s.io/kubernetes/cmd/kubectl", "github.com/google/go-containerregistry/cmd/crane"),
	} {
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if output, err := build.CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%s: %w\n%s", build, err, output)
		}
	}
	runtime.LockOSThread() // the signal for the parent's death is one for the death of its thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), programsKey+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	if cmd.ProcessState == nil {
		return 0, err
	}
	return cmd.ProcessState.ExitCode(), nil
}

// setUpNetwork brings up the loopback interface and puts a table of hosts in the place of the machine's.
func setUpNetwork() error {
	loopback, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	for _, address := range []string{proxyIPv4 + "/32", secureIPv4 + "/32", proxyIPv6 + "/128", secureIPv6 + "/128"} {
		parsed, err := netlink.ParseAddr(address)
		if err := errors.Join(err, netlink.AddrAdd(loopback, parsed)); err != nil {
			return err
		}
	}
	hosts := filepath.Join(programs, "hosts")
	table := fmt.Sprintf("127.0.0.1 localhost\n%s %s\n%s %s\n",
		proxyIPv4, strings.Join(proxyNames(), " "), secureIPv4, secureName)
	return errors.Join(
		netlink.LinkSetUp(loopback),
		os.WriteFile(hosts, []byte(table), 0o644),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(hosts, "/etc/hosts", "", unix.MS_BIND, ""))
}

// trustProxy writes the proxy's CA as a file for most tools, and one for Java.
func trustProxy() error {
	file := filepath.Join(programs, "ca.pem")
	if err := os.WriteFile(file, goproxy.CA_CERT, 0o644); err != nil {
		return err
	}
	output, err := exec.Command("keytool", "-importcert", "-noprompt", "-keystore", filepath.Join(programs, "keys"),
		"-storepass", "changeit", "-alias", "proxy", "-file", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("keytool: %w: %s", err, output)
	}
	return nil
}

// manifest returns an object that a file of YAML has.
func manifest(t *testing.T, path string) map[string]any {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var object map[string]any
	if err := yaml.UnmarshalStrict(text, &object); err != nil {
		t.Fatal(err)
	}
	return object
}

// at returns what an object holds at a path of names.
func at[T any](t *testing.T, object map[string]any, path ...string) T {
	t.Helper()
	var value any = object
	for _, name := range path {
		fields, _ := value.(map[string]any)
		value = fields[name]
	}
	found, ok := value.(T)
	if !ok {
		t.Fatalf("%v is %v", path, value)
	}
	return found
}

// render writes the files of a Connector into a new directory, which it returns with what the command said.
func render(t *testing.T, configuration, token string, objects ...map[string]any) (string, error) {
	t.Helper()
	dir := t.TempDir()
	list, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
	if err := errors.Join(err, os.WriteFile(dir+"/token", []byte(token), 0o600), os.Mkdir(dir+"/volume", 0o700)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(programs, "connectors-csi"), "render", "--configuration.names", configuration,
		"--token-file", dir+"/token", "--output-dir", dir+"/volume")
	cmd.Stdin = strings.NewReader(string(list))
	if output, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, output)
	}
	return dir + "/volume", nil
}
