// Package node runs a real single-node Kubernetes on this machine, from programs that Go modules provide, and without a
// container engine.
package node

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
)

// A node is three processes of this one program:
//
//	command  what the user started. It builds what is needed, on the host, because the node has no
//	         network. Then it starts init and waits for it.
//	init     the first process of the node's own mount, network and PID namespaces. It sets them up
//	         and starts work. When work ends, or the command does (however that happens: init reads
//	         from a pipe that the command holds), it ends all processes and removes the node's cgroups.
//	work     starts Kubernetes in the namespaces, then does what the command is about.
//
// So everything between On's call and its return happens inside the namespaces: plain exec, plain
// connections, plain paths.
const (
	envProcess = "E2E_PROCESS" // "init" or "work"; not set: command
	envDir     = "E2E_DIR"     // the node's directory on the host: logs, kubeconfig files, bin (links to the programs)
)

// Interrupted is the exit code after Ctrl-C, as shells have it.
const Interrupted = 130

// Name is that of the node's object.
const Name = "node"

// Addresses from the range for benchmarks (RFC 2544). They exist in the node's network namespace only.
const (
	bridge       = "node0"
	IP           = "198.18.0.1"
	podNetwork   = "198.18.0.0/24"
	firstPodIP   = "198.18.0.10"
	targetIP     = "198.18.0.2" // what every name below example.com leads to
	MovedIP      = "198.18.0.3" // what a test may make it lead to
	serviceRange = "198.19.0.0/24"
	APIServiceIP = "198.19.0.1" // the first of serviceRange is always the Service "kubernetes"
	dnsServiceIP = "198.19.0.10"
)

// Outside reports whether this process is the command.
func Outside() bool { return os.Getenv(envProcess) == "" }

// On starts a node, calls work inside it and returns the exit code for the process.
func On(work func(*Node) int) int {
	code, err := 0, error(nil)
	switch os.Getenv(envProcess) {
	case "":
		code, err = runCommand()
	case "init":
		code, err = runInit()
	case "work":
		code, err = runWork(work)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return code
}

// runCommand is the part on the host: it builds, runs the node and keeps its logs if something failed.
func runCommand() (code int, err error) {
	if os.Geteuid() != 0 {
		return 0, errors.New("a Kubernetes node needs root: run this command as root")
	}
	// `go run` and `go test` are this process's parent. When one is killed, this process is to end as well.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGTERM), 0, 0, 0); err != nil {
		return 0, err
	}
	if err := machine.Install(nodeNeeds()); err != nil {
		return 0, err
	}
	if _, err := image.FetchNginx(); err != nil {
		return 0, err
	}
	module, err := releaseModule()
	if err != nil {
		return 0, err
	}
	removeStaleCgroups()
	if err := enableControllers(); err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", fmt.Sprintf("%s%d-", machine.Prefix, os.Getpid()))
	if err != nil {
		return 0, err
	}
	if err := linkTools(filepath.Join(dir, "bin"), module); err != nil {
		return 0, errors.Join(err, os.RemoveAll(dir))
	}
	if code, err = runNode(dir); err == nil && (code == 0 || code == Interrupted) {
		return code, os.RemoveAll(dir)
	}
	fmt.Fprintln(os.Stderr, "e2e: the logs of all components are in", dir)
	return code, err
}

// runNode runs init in new namespaces until it ends, or a signal ends it.
func runNode(dir string) (code int, err error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	version, err := image.DriverVersion()
	if err != nil {
		return 0, err
	}
	if err := image.BuildDriver("..", filepath.Join(dir, "connectors-csi"), runtime.GOARCH, version); err != nil {
		return 0, err
	}
	init, release, err := startInit(dir)
	if err != nil {
		return 0, err
	}
	ended := make(chan error, 1)
	go func() { ended <- init.Wait() }()
	select {
	case err = <-ended:
	case <-signals:
		release.Close()
		<-ended
		return Interrupted, nil
	}
	removeCgroups(filepath.Base(dir)) // has work to do only if init itself was killed
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return max(exit.ExitCode(), 1), nil
	}
	return 0, err
}

// startInit starts this program again as the first process of new namespaces. It ends when release is
// closed.
func startInit(dir string) (init *exec.Cmd, release io.Closer, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	// go test must not keep this run's result: it doesn't see what the node reads (the driver, docs).
	// Without the file that this flag names, it doesn't.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(arg string) bool {
		return strings.HasPrefix(arg, "-test.testlogfile=")
	})
	init = exec.Command(self, args...)
	init.Env = append(os.Environ(), envProcess+"=init", envDir+"="+dir)
	init.Stdout, init.Stderr = os.Stdout, os.Stderr
	if release, err = init.StdinPipe(); err != nil {
		return nil, nil, err
	}
	init.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true, // Ctrl-C is for the command alone
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID,
	}
	if err := init.Start(); err != nil {
		return nil, nil, fmt.Errorf("start a process in new namespaces: %w", err)
	}
	return init, release, pointTo(dir, init.Process.Pid)
}

// runInit is the first process of the node's namespaces, and so the parent of all orphans in it.
func runInit() (int, error) {
	cgroup := filepath.Base(os.Getenv(envDir))
	for _, setUp := range []func() error{setUpMounts, setUpNetwork, func() error { return createCgroups(cgroup) }} {
		if err := setUp(); err != nil {
			return 0, err
		}
	}
	defer removeCgroups(cgroup)

	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	work := exec.Command(self, os.Args[1:]...)
	work.Env = append(os.Environ(), envProcess+"=work")
	work.Stdout, work.Stderr = os.Stdout, os.Stderr
	if err := work.Start(); err != nil {
		return 0, err
	}
	var released atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin) // returns when the command has gone
		released.Store(true)
		unix.Kill(-1, unix.SIGKILL)
	}()
	status := reap(work.Process.Pid)
	unix.Kill(-1, unix.SIGKILL)
	reap(0)
	if status.Signaled() && !released.Load() {
		return 0, fmt.Errorf("the process that runs the node was ended by signal %v", status.Signal())
	}
	return status.ExitStatus(), nil
}

// reap waits for children, orphans included, until the one with this pid has ended or none is left.
func reap(pid int) unix.WaitStatus {
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, 0, nil)
		if err == unix.ECHILD || err == nil && ended == pid {
			return status
		}
	}
}

// setUpMounts hides what the node writes from the host: /run, /var/lib and /var/log stay in memory.
// Nothing is left of them when the namespace's last process has ended.
func setUpMounts() error {
	overlay := func(dir, name string) string {
		return fmt.Sprintf("lowerdir=%s,upperdir=/run/%s/upper,workdir=/run/%s/work", dir, name, name)
	}
	for _, m := range []struct {
		source, target, fstype string
		flags                  uintptr
		data                   string
		mkdir                  []string // created before
	}{
		{target: "/", flags: unix.MS_REC | unix.MS_PRIVATE},
		{source: "proc", target: "/proc", fstype: "proc"},
		{source: "tmpfs", target: "/run", fstype: "tmpfs", data: "mode=0755"},
		{source: "overlay", target: "/var/lib", fstype: "overlay", data: overlay("/var/lib", "lib"),
			mkdir: []string{"/run/lib/upper", "/run/lib/work"}},
		{source: "overlay", target: "/var/log", fstype: "overlay", data: overlay("/var/log", "log"),
			mkdir: []string{"/run/log/upper", "/run/log/work"}},
		{source: "tmpfs", target: "/var/lib/kubelet", fstype: "tmpfs", data: "mode=0755",
			mkdir: []string{"/var/lib/kubelet"}},
		{target: "/var/lib/kubelet", flags: unix.MS_SHARED}, // for mountPropagation: Bidirectional
	} {
		for _, dir := range m.mkdir {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	return nil
}

// setUpNetwork makes the bridge that Pods are attached to.
func setUpNetwork() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridge
	// Its own address, or it would have the lowest of its ports: another one whenever a Pod comes or goes, which the
	// others do not learn for up to two minutes.
	attrs.HardwareAddr = net.HardwareAddr{0x02, 0, 0, 0, 0, 1}
	br := &netlink.Bridge{LinkAttrs: attrs}
	address := func(cidr string) *netlink.Addr {
		ip, network, err := net.ParseCIDR(cidr)
		if err != nil {
			panic(err) // they are constants
		}
		return &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: network.Mask}}
	}
	return errors.Join(
		netlink.LinkSetUp(lo),
		netlink.LinkAdd(br),
		netlink.AddrAdd(br, address(IP+"/24")),
		netlink.AddrAdd(br, address(targetIP+"/32")),
		netlink.AddrAdd(br, address(MovedIP+"/32")),
		netlink.LinkSetUp(br),
		// Kubernetes' components take the address of the interface with the default route for the node's.
		netlink.RouteAdd(&netlink.Route{LinkIndex: br.Attrs().Index, Dst: address("0.0.0.0/0").IPNet}),
	)
}

// Node is the running Kubernetes, as seen from inside its namespaces.
type Node struct {
	Dir string // on the host; kept if something fails

	APIServer, Kubelet *Component // tests stop and restart them

	Targets *Targets
}

// runWork starts Kubernetes and calls work.
func runWork(work func(*Node) int) (int, error) {
	n := &Node{Dir: os.Getenv(envDir)}
	os.Setenv("PATH", n.Path("bin")+":"+os.Getenv("PATH"))
	os.Setenv("KUBECONFIG", n.Path("admin.kubeconfig"))
	began := time.Now()
	if err := n.start(); err != nil {
		return 0, err
	}
	fmt.Printf("A Kubernetes node is ready after %.0f s.\n", time.Since(began).Seconds())
	return work(n), nil
}

// Path names a file in the node's directory.
func (n *Node) Path(name string) string { return filepath.Join(n.Dir, name) }

// start starts all components and returns when the node can run Pods.
func (n *Node) start() error {
	if err := n.writeConfiguration(); err != nil {
		return err
	}
	if err := n.startTargets(); err != nil {
		return err
	}
	n.Run("containerd", "--config", n.Path("containerd.toml"))
	n.Run("server", // etcd's main package is called that
		"--data-dir", "/run/etcd", "--unsafe-no-fsync", "--log-level", "warn")
	n.APIServer = n.Run("kube-apiserver",
		"--etcd-servers", "http://127.0.0.1:2379",
		"--advertise-address", IP, "--bind-address", IP, "--secure-port", "443", "--cert-dir", n.Dir,
		"--service-cluster-ip-range", serviceRange,
		"--token-auth-file", n.Path("tokens.csv"),
		"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction",
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", n.Path("service-account.key"),
		"--service-account-signing-key-file", n.Path("service-account.key"),
		"--allow-privileged",
		"--kubelet-preferred-address-types", "InternalIP") // the default asks DNS for the node's name first
	if err := cluster.Await(StartLimit, func() error { return machine.Run("ctr", "version") }); err != nil {
		return fmt.Errorf("containerd is not ready: %w", err)
	}
	if err := n.importImages(); err != nil {
		return err
	}
	ready := func() error { _, err := cluster.Kubectl("get", "--raw", "/readyz"); return err }
	if err := cluster.Await(StartLimit, ready); err != nil {
		return fmt.Errorf("kube-apiserver is not ready: %w", err)
	}
	n.Run("kube-controller-manager",
		"--kubeconfig", n.Path("controller-manager.kubeconfig"), "--leader-elect=false",
		"--use-service-account-credentials",
		"--service-account-private-key-file", n.Path("service-account.key"),
		"--root-ca-file", n.Path("apiserver.crt"))
	n.Run("kube-scheduler",
		"--kubeconfig", n.Path("scheduler.kubeconfig"), "--leader-elect=false")
	n.Kubelet = n.Run("kubelet",
		"--kubeconfig", n.Path("kubelet.kubeconfig"), "--config", n.Path("kubelet.yaml"),
		"--hostname-override", Name, "--node-ip", IP)
	if err := n.startServices(); err != nil {
		return err
	}

	for _, wait := range [][]string{
		{"--for=create", "serviceaccount/default"},
		{"--for=create", "node/" + Name},
		{"--for=condition=Ready", "node/" + Name},
	} {
		if _, err := cluster.Kubectl(append([]string{"wait", "--timeout=60s"}, wait...)...); err != nil {
			return err
		}
	}
	return nil
}
