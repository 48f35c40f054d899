// Command connectors-csi is a CSI driver that mounts the configuration of Connectors into Pods: rendered from
// their ConnectorClasses, with a short-lived token of the Pod's ServiceAccount, and kept current.
//
// It runs as one privileged container on every node. What happens to a volume there:
//
//   - Before a Pod's containers start, kubelet calls NodePublishVolume with the volume's attributes, a token
//     of the Pod's ServiceAccount and the target path, at which the volume is to be mounted. If that fails it
//     calls again.
//   - From then on kubelet republishes: it makes the same call every 60 to 90 seconds, with a newer token now
//     and then.
//   - When a Connector or a class has changed, the driver pushes: it does what a republish does, without
//     being called.
//   - When the Pod has ended, kubelet calls NodeUnpublishVolume, again and again until it succeeds.
//   - A driver that was restarted finds the volumes mounted, and knows of each what it needs after kubelet's
//     next call.
//
// Each time that files are written they make a new generation, a directory; the link ..data of the volume
// leads to the newest, so that they change all at once. A reader is a ServiceAccount with whose token
// Connectors are read, or the driver, with its own token for classes.
//
// The files, in the order of a publish:
//
//	main.go    flags, wiring, the command render, kubelet's plugin registration, health and metrics
//	csi.go     the gRPC services: validates, reads, renders, mounts; pushes; errors for people and for kubelet
//	kube.go    the Kubernetes API: objects, tokens, a cache, watches, and the limits of each namespace
//	render.go  objects in, files out; and the renderer, the child process that does it
//	mount.go   files in, a read-only tmpfs out
package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// version is set by the linker.
var version = "dev"

// serviceAccountDir is where kubelet mounts the token and the CA of the driver's own ServiceAccount.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// maxRequestBytes is what a message of kubelet may have: the attributes, two tokens and some room.
const maxRequestBytes = 128 << 10

func main() {
	if len(os.Args) > 1 && (os.Args[1] == confineArgument || os.Args[1] == serveArgument) {
		os.Exit(rendererMain(os.Args[1:]))
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	var err error
	if len(os.Args) > 1 && os.Args[1] == "render" {
		err = preview(os.Args[2:], os.Stdin, os.Stdout)
	} else {
		err = run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "connectors-csi: "+oneLine(err.Error()))
		os.Exit(1)
	}
}

// oneLine makes one line of a text that may be anybody's, with nothing in it that a terminal obeys.
func oneLine(text string) string {
	quoted := strconv.Quote(text)
	return strings.NewReplacer(`\"`, `"`, `\\`, `\`).Replace(quoted[1 : len(quoted)-1])
}

const usage = `connectors-csi [flags]
  is the CSI driver: it serves kubelet on a node of a cluster.
connectors-csi render [flags]
  prints the files that a Pod would get, without a cluster: from the ConnectorClasses and Connectors on
  standard input, as "kubectl get -o json" prints them. Its flags: connectors-csi render --help

The flags of the driver:
`

const builtInUsage = "mount the built-in files (.env, context.token, ca.crt, …) in every volume, and make " +
	"configuration.names optional"

// run is the driver: flags, checks that end the start with a remedy, and then serve.
func run() error {
	nodeName := flag.String("node-name", os.Getenv("NODE_NAME"), "name of this node; default: $NODE_NAME")
	kubeletDir := flag.String("kubelet-dir", "/var/lib/kubelet", "kubelet's --root-dir")
	httpAddress := flag.String("http-address", ":9808", "address for /healthz, /readyz and /metrics")
	refresh := flag.Duration("refresh-interval", time.Minute,
		"how old a Connector or ConnectorClass may be when a mounted volume is refreshed")
	builtIn := flag.Bool("builtin-files", false, builtInUsage)
	volumesBudget := flag.Int64("volumes-budget", 240, "memory for the mounted volumes of all Pods together, "+
		"in MiB; it is part of the container's memory limit")
	showVersion := flag.Bool("version", false, "print the version and exit")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage); flag.PrintDefaults() }
	flag.Parse()
	if *showVersion {
		fmt.Println(version)
		return nil
	}

	podsDir := filepath.Join(*kubeletDir, "pods")
	switch {
	case flag.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case *nodeName == "":
		return errors.New("no node name: set NODE_NAME from spec.nodeName, or --node-name")
	case !filepath.IsAbs(*kubeletDir):
		return fmt.Errorf("--kubelet-dir %q must be an absolute path", *kubeletDir)
	case *refresh <= 0:
		return fmt.Errorf("--refresh-interval %v must be above zero", *refresh)
	case *volumesBudget <= 0, *volumesBudget > math.MaxInt64>>20:
		return fmt.Errorf("--volumes-budget %d must be above zero, and be a number of MiB", *volumesBudget)
	}
	if err := checkKernel(); err != nil {
		return err
	}
	if err := checkShared(podsDir); err != nil {
		return err
	}
	if err := dropCapabilities(); err != nil {
		return err
	}
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the driver runs in " +
			"a Pod only")
	}
	d, err := newDriver(driverConfig{
		nodeName: *nodeName, podsDir: podsDir, builtInFiles: *builtIn, volumesBudget: *volumesBudget << 20,
		binary: "/proc/self/exe", log: slog.Default(),
		api: kubeConfig{server: "https://" + net.JoinHostPort(host, port), directory: serviceAccountDir,
			refresh: *refresh},
	})
	if err != nil {
		return err
	}
	go func() {
		for range time.Tick(time.Minute) {
			d.forgetUnmounted()
		}
	}()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return serve(ctx, d, filepath.Join(*kubeletDir, "plugins_registry", driverName+"-reg.sock"), *httpAddress)
}

// neededCapabilities is what the driver keeps of a privileged container's capabilities(7): it mounts, gives
// files to their owner and a Pod's fsGroup, writes into directories that nobody may write, and starts
// renderers as another user with an empty root directory, and ends them.
const neededCapabilities = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE |
	1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_SETPCAP | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_KILL

// dropCapabilities gives up all others for ever, on all threads, and whatever a program could gain when it is
// executed.
func dropCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData // the numbers of the needed ones are all in the first
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return fmt.Errorf("capget: %w", err)
	}
	kept := sets[0].Permitted & neededCapabilities
	sets = [2]unix.CapUserData{{Effective: kept, Permitted: kept}}
	var errno syscall.Errno
	for number := uintptr(0); errno == 0; number++ { // EINVAL comes after the last
		if neededCapabilities>>number&1 == 0 {
			_, _, errno = syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, number, 0)
		}
	}
	if errno == unix.EINVAL {
		_, _, errno = syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)),
			uintptr(unsafe.Pointer(&sets)), 0)
	}
	if errno == 0 {
		_, _, errno = syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	}
	switch errno {
	case 0:
		return nil
	case unix.ENOTSUP: // a program that is linked with a C library has threads that Go does not know
		slog.Warn("the driver keeps all capabilities: build it with CGO_ENABLED=0")
		return nil
	}
	return fmt.Errorf("giving up capabilities: %w", errno)
}

// preview is the command render:
//
//  1. read the objects
//  2. validate the attributes, which are flags here
//  3. find the Connectors and their classes
//  4. render, with the limits and the messages of a publish, and once more with the word TOKEN
//  5. print the files
//
// With --check it does step 4 for every configuration that there is, and prints what fails.
func preview(arguments []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("connectors-csi render", flag.ExitOnError)
	attributes := map[string]string{}
	for _, name := range knownAttributes {
		flags.Func(name, "as in the Pod's volumeAttributes",
			func(value string) error { attributes[name] = value; return nil })
	}
	namespace := flags.String("namespace", "", "the Pod's namespace (default: that of the first Connector)")
	builtIn := flags.Bool("builtin-files", false, builtInUsage)
	tokenFile := flags.String("token-file", "", "a file with the token to render (default: the word TOKEN)")
	outputDir := flags.String("output-dir", "",
		"write the files into this directory, instead of printing them")
	check := flags.Bool("check", false, "render each configuration of each Connector's class, as far as it "+
		"needs no parameters, and print a line for each problem instead of the files")
	flags.Parse(arguments)
	switch {
	case flags.NArg() > 0:
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case *check && (len(attributes) > 0 || *outputDir != ""):
		return errors.New("--check takes all Connectors and configurations: leave out volumeAttributes and " +
			"--output-dir")
	}
	token := placeholderToken
	if *tokenFile != "" {
		text, err := os.ReadFile(*tokenFile)
		if err != nil {
			return err
		}
		if token = strings.TrimSpace(string(text)); token == "" || len(token) > maxTokenBytes {
			return fmt.Errorf("there is no token in %s, of at most %d KiB", *tokenFile, maxTokenBytes>>10)
		}
	}

	// 1. read
	in, err := readInput(stdin, *namespace)
	if err != nil {
		return err
	}
	if *check {
		return in.check(*builtIn, token, stdout)
	}

	// 2. validate
	podNamespace := cmp.Or(*namespace, in.connectors[0].namespace)
	if attributes[attrName] == "" && attributes[attrNamespace] == "" && attributes[attrConnectors] == "" {
		for _, r := range in.connectors {
			attributes[attrConnectors] += "," + r.namespace + "/" + r.name
		}
	}
	a, err := parseAttributes(attributes, podNamespace, *builtIn)
	if err = cmp.Or(err, a.check()); err != nil {
		return err
	}

	// 3. and 4.
	f, err := in.render(a, podNamespace, token)
	if err != nil {
		return err
	}
	if *tokenFile == "" {
		if shown, err := in.render(a, podNamespace, "TOKEN"); err == nil { // some functions want a longer one
			f = shown
		}
	}

	// 5. print
	if *outputDir != "" {
		return writeOut(f, *outputDir)
	}
	between := ""
	for _, name := range slices.Sorted(maps.Keys(f)) {
		heading := ""
		if len(f) > 1 { // as tail(1) has it
			heading, between = between+"==> "+name+" <==\n", "\n"
		}
		if _, err := fmt.Fprintf(stdout, "%s%s", heading, f[name]); err != nil {
			return err
		}
	}
	return nil
}

// render is what preview does for a volume: its steps 3 and 4.
func (in *input) render(a attributes, podNamespace, token string) (files, error) {
	// 3. find
	all := sizes{limit: maxVolumeObjectsBytes}
	connector := func(ref reference) (*apiObject, error) {
		o := in.objects[ref]
		if o == nil {
			return nil, failuref(codes.FailedPrecondition, "it is not in the input%s", in.foreign)
		}
		return o, all.add(o)
	}
	class := func(name string) (*apiObject, error) { return connector(reference{"", name}) }
	sources, err := collectSources(podIdentity{}, a.connectors, connector, class)
	if err == nil {
		_, err = proxyAudiences(sources)
	}
	if err != nil {
		return nil, err
	}

	// 4. render
	log := slog.New(slog.DiscardHandler) // what a renderer lacks here is not worth a word
	p := newRenderers("/proc/self/exe", log, newMetrics(nil))
	defer p.close()
	return p.render(context.Background(), podNamespace,
		job{sources: sources, selection: a.selection, token: token})
}

// check renders each configuration of each Connector's class for that Connector alone, and prints each
// problem once. Where the class is missing or has none, rendering a configuration without a name says so.
func (in *input) check(builtIn bool, token string, stdout io.Writer) error {
	problems, rendered, unchecked := map[string]bool{}, 0, 0
	for _, ref := range in.connectors {
		configurations := []object{{}}
		if class := in.objects[reference{"", in.objects[ref].class}]; class != nil {
			value, err := decodeJSON(class.raw)
			if err != nil {
				return err
			}
			if of := objectList(value.(object), "spec", "configurations"); len(of) > 0 {
				configurations = of
			}
		}
		for _, c := range configurations {
			want := selection{Configurations: []string{stringAt(c, "name")}, BuiltIn: builtIn}
			a := attributes{connectors: []reference{ref}, selection: want}
			_, err := in.render(a, ref.namespace, token)
			problem := oneLine(fmt.Sprintf("%v: %v", ref, err))
			switch {
			case err == nil:
				rendered++
			case codeOf(err) == codes.InvalidArgument: // a parameter has no default
				unchecked++
			case !problems[problem]:
				problems[problem] = true
				fmt.Fprintln(stdout, problem)
			}
		}
	}
	summary := fmt.Sprintf("problems: %d; configurations that render: %d, that need configuration.params: %d",
		len(problems), rendered, unchecked)
	if len(problems) > 0 {
		return errors.New(summary)
	}
	fmt.Fprintln(os.Stderr, "connectors-csi: "+summary)
	return nil
}

const (
	maxInputBytes = 64 << 20
	maxListDepth  = 4 // of lists in lists, each level of which is decoded once more
)

// input is what was read from standard input.
type input struct {
	namespace  string      // of a Connector that names none
	connectors []reference // in their order
	objects    map[reference]*apiObject
	foreign    string // says that an object of another API was passed over, if one was
}

// readInput reads objects, lists of objects, or several of either one after the other. Kinds that have
// nothing to do with rendering are passed over, and so are those of another API that have the same names. A
// Connector without a namespace is one of the given namespace, or of "default".
func readInput(stdin io.Reader, namespace string) (*input, error) {
	in := &input{namespace: cmp.Or(namespace, "default"), objects: map[reference]*apiObject{}}
	limited := &io.LimitedReader{R: stdin, N: maxInputBytes}
	for d := json.NewDecoder(limited); ; {
		var value json.RawMessage
		if err := d.Decode(&value); errors.Is(err, io.EOF) && limited.N > 0 {
			break
		} else if err != nil {
			return nil, fmt.Errorf("standard input is not JSON of less than %d MiB, as kubectl get -o json "+
				"prints it: %w", maxInputBytes>>20, err)
		}
		if err := in.add(value, maxListDepth); err != nil {
			return nil, err
		}
	}
	if len(in.connectors) == 0 {
		return nil, errors.New("there is no Connector on standard input" + in.foreign)
	}
	return in, nil
}

// add takes an object, or the items of a list, in which others may be nested so deep.
func (in *input) add(raw json.RawMessage, depth int) error {
	if depth < 0 {
		return errors.New("standard input has too many lists in one another")
	}
	var list struct {
		APIVersion, Kind string
		Items            []json.RawMessage
	}
	if err := json.Unmarshal(raw, &list); err != nil {
		return fmt.Errorf("standard input holds something that is no Kubernetes object: %w", err)
	}
	for _, item := range list.Items {
		if err := in.add(item, depth-1); err != nil {
			return err
		}
	}
	isClass := list.Kind == "ConnectorClass"
	if !isClass && list.Kind != "Connector" {
		return nil
	}
	if ours := strings.TrimPrefix(connectorsAPI, "/apis/"); list.APIVersion != ours {
		in.foreign = fmt.Sprintf("; a %s with apiVersion %q was passed over, since it is not %s", list.Kind,
			cut(list.APIVersion, maxQuotedBytes), ours)
		return nil
	}
	value, err := decodeJSON(raw)
	if err != nil {
		return err
	}
	ref := reference{"", stringAt(value.(object), "metadata", "name")}
	if ref.name == "" {
		return fmt.Errorf("a %s on standard input has no metadata.name", list.Kind)
	}
	if !isClass {
		metadata := value.(object)["metadata"].(object)
		ref.namespace = cmp.Or(stringAt(metadata, "namespace"), in.namespace)
		metadata["namespace"] = ref.namespace
		if in.objects[ref] == nil {
			in.connectors = append(in.connectors, ref)
		}
	}
	if raw, err = json.Marshal(value); err == nil {
		in.objects[ref], err = parseObject(raw)
	}
	if err != nil {
		return fmt.Errorf("the %s %q on standard input: %w", list.Kind, ref.name, err)
	}
	return nil
}

// writeOut writes the files into a directory, each as a new one, since one that is there may be a link, or
// open to others.
func writeOut(f files, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(f)) {
		path := filepath.Join(dir, name)
		if err := unix.Unlink(path); err != nil && err != unix.ENOENT {
			return fmt.Errorf("replacing %s: %w", path, err)
		}
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = file.Write(f[name])
		if err = errors.Join(err, file.Close()); err != nil {
			return err
		}
	}
	return nil
}

// serve runs the driver until ctx ends. Then it removes the socket, finishes the calls under way, a publish within
// publishTimeout, and ends the rest.
func serve(ctx context.Context, d *driver, socket, httpAddress string) error {
	// Two calls at a time run on goroutines whose stacks have grown already: 57 µs for one that changes nothing
	// instead of 67. The option is experimental.
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxRequestBytes), grpc.NumStreamWorkers(2))
	csi.RegisterIdentityServer(server, d)
	csi.RegisterNodeServer(server, d)
	r := &registration{socket: socket, server: server, log: d.log}
	server.RegisterService(&registrationService, r)

	probe, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer probe.Close()
	listener, err := net.Listen("tcp", httpAddress)
	if err != nil {
		return err
	}
	defer listener.Close()
	if err := r.listen(); err != nil {
		return err
	}
	w := &web{registration: r, metrics: d.metrics}
	go w.checkHealth(ctx, csi.NewIdentityClient(probe))
	go w.serve(listener.(*net.TCPListener))
	d.log.Info("started", "version", version, "node", d.nodeName, "socket", socket,
		"http", listener.Addr().String())
	err = r.keepSocket(ctx)
	if r.present() {
		os.Remove(socket)
	}
	server.GracefulStop()
	d.close()
	d.log.Info("stopped")
	return err
}

// web serves what probes and Prometheus ask for, on a port that everybody in the cluster's network may reach.
// So a connection is good for one request, and what all of them take together is bounded, which it is not in
// net/http's server: that keeps one that was displaced for another half second.
type web struct {
	registration *registration
	metrics      *metrics

	mu     sync.Mutex     // guards the rest
	open   []*net.TCPConn // the oldest first
	health error          // of the last call that the driver made to itself
}

// The limits of connections: of all of them, and of each.
const (
	maxWebConnections = 64
	maxWebBytes       = 4 << 10 // that the client sends
	webTime           = 5 * time.Second
)

// serve takes connections until the listener is closed.
func (w *web) serve(listener *net.TCPListener) {
	for {
		conn, err := listener.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // there is no descriptor left, for instance
			time.Sleep(100 * time.Millisecond)
			continue
		}
		w.admit(conn)
		go w.answer(conn)
	}
}

// admit counts a connection. One too many displaces the oldest of the client that has the most: so a flood
// displaces itself, and no probe.
func (w *web) admit(conn *net.TCPConn) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open = append(w.open, conn); len(w.open) <= maxWebConnections {
		return
	}
	client := func(c *net.TCPConn) netip.Addr { return c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr() }
	count := map[netip.Addr]int{}
	for _, c := range w.open {
		count[client(c)]++
	}
	oldest := slices.MaxFunc(w.open, func(a, b *net.TCPConn) int { // it takes the first of several
		return cmp.Compare(count[client(a)], count[client(b)])
	})
	oldest.Close()
	w.open = slices.DeleteFunc(w.open, func(c *net.TCPConn) bool { return c == oldest })
}

// answer answers one request, and waits until the client closes the connection, which it does when it has the
// answer: by SetLinger(0) the kernel keeps nothing of one that is closed here.
func (w *web) answer(conn *net.TCPConn) {
	defer func() {
		conn.Close()
		w.mu.Lock()
		defer w.mu.Unlock()
		w.open = slices.DeleteFunc(w.open, func(c *net.TCPConn) bool { return c == conn })
	}()
	conn.SetLinger(0)
	conn.SetDeadline(time.Now().Add(webTime))
	in := io.LimitReader(conn, maxWebBytes)
	request, err := http.ReadRequest(bufio.NewReader(in))
	if err != nil {
		return
	}
	code, text := w.page(request)
	fmt.Fprintf(conn, "HTTP/1.1 %d %s\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"+
		"Content-Length: %d\r\nConnection: close\r\n\r\n%s", code, http.StatusText(code), len(text), text)
	conn.CloseWrite()
	io.Copy(io.Discard, in)
}

// page is the answer to a request.
func (w *web) page(request *http.Request) (code int, text string) {
	w.mu.Lock()
	err := w.health
	w.mu.Unlock()
	switch path := request.URL.Path; {
	case request.Method != http.MethodGet:
		return http.StatusMethodNotAllowed, "only GET\n"
	case path == "/metrics":
		return http.StatusOK, w.metrics.text()
	case path == "/readyz":
		err = w.registration.ready()
	case path != "/healthz":
		return http.StatusNotFound, "there are /healthz, /readyz and /metrics\n"
	}
	if err != nil {
		return http.StatusServiceUnavailable, err.Error() + "\n"
	}
	return http.StatusOK, "ok\n"
}

// checkHealth calls the driver over one connection to its socket each second, so that no request causes a call.
func (w *web) checkHealth(ctx context.Context, identity csi.IdentityClient) {
	for ; ctx.Err() == nil; time.Sleep(time.Second) {
		call, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := identity.Probe(call, &csi.ProbeRequest{})
		cancel()
		if err != nil { // its text has the socket's path
			err = fmt.Errorf("the driver does not answer its own call: %v", status.Code(err))
		}
		w.mu.Lock()
		w.health = err
		w.mu.Unlock()
	}
}

// registration makes kubelet know the driver, by kubelet's plugin registration API, version 1
// (k8s.io/kubelet/pkg/apis/pluginregistration/v1): kubelet finds the socket in its plugins_registry
// directory, asks for the plugin's name and says how the registration went. The same socket serves the CSI
// services.
type registration struct {
	socket string
	server *grpc.Server
	log    *slog.Logger

	listener net.Listener // of keepSocket's goroutine

	mu         sync.Mutex  // guards the rest
	inode      fs.FileInfo // of the socket that this process made
	registered bool
}

// listen makes the socket and serves on it. A socket that a killed process left is replaced; anything else
// that has its name is not.
func (r *registration) listen() error {
	if most := len(unix.RawSockaddrUnix{}.Path) - 1; len(r.socket) > most {
		return fmt.Errorf("%s is too long for the path of a socket: it has %d bytes, and may have %d; kubelet "+
			"needs a shorter --root-dir", r.socket, len(r.socket), most)
	}
	if info, err := os.Lstat(r.socket); err == nil {
		if info.Mode().Type() != fs.ModeSocket {
			return fmt.Errorf("%s exists and is not a socket", r.socket)
		}
		if conn, err := net.Dial("unix", r.socket); err == nil {
			conn.Close()
			return fmt.Errorf("another process serves %s: a node can have one driver of this name", r.socket)
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return err
		}
		if err := os.Remove(r.socket); err != nil {
			return err
		}
	}
	listener, err := net.Listen("unix", r.socket)
	if err != nil {
		return fmt.Errorf("%w; mount kubelet's plugins_registry directory there", err)
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false) // by then it may be another's
	inode, err := os.Lstat(r.socket)
	if err = errors.Join(err, os.Chmod(r.socket, 0o600)); err != nil {
		return errors.Join(err, listener.Close())
	}
	r.listener = listener
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inode, r.registered = inode, false
	go r.server.Serve(listener)
	return nil
}

// keepSocket makes the socket again whenever somebody has removed or replaced it, until ctx ends.
func (r *registration) keepSocket(ctx context.Context) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Second):
		}
		if r.present() {
			continue
		}
		r.log.Warn("the registration socket is gone; making it again", "socket", r.socket)
		r.listener.Close()
		if err := r.listen(); err != nil {
			return err
		}
	}
}

// present reports whether the socket is still the one that this process made.
func (r *registration) present() bool {
	info, err := os.Lstat(r.socket)
	r.mu.Lock()
	defer r.mu.Unlock()
	return err == nil && os.SameFile(info, r.inode)
}

// ready returns why kubelet would not call the driver now, or nil.
func (r *registration) ready() error {
	if !r.present() {
		return errors.New("the registration socket is gone")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.registered {
		return errors.New("kubelet has not registered the driver yet")
	}
	return nil
}

// notified notes how the registration went. Kubelet tries a failed one again by itself.
func (r *registration) notified(registered bool, message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.registered = registered
	if registered {
		r.log.Info("registered by kubelet")
	} else {
		r.log.Error("kubelet did not register the driver", "error", message)
	}
}

// registrationService is kubelet's API. Instead of a module with its two messages it takes others that are
// the same on the wire: PluginInfo has the strings type = 1, name = 2 and supported_versions = 4, and without
// an endpoint kubelet takes the socket that it found; RegistrationStatus has plugin_registered = 1, a bool,
// and error = 2, a string, where gRPC's own Status has code and message.
var registrationService = grpc.ServiceDesc{
	ServiceName: "pluginregistration.Registration",
	HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{
		{MethodName: "GetInfo", Handler: func(_ any, _ context.Context, decode func(any) error,
			_ grpc.UnaryServerInterceptor) (any, error) {
			return &csi.NodeExpandVolumeRequest{VolumeId: "CSIPlugin", VolumePath: driverName,
				StagingTargetPath: "1.0.0"}, decode(new(csi.ProbeRequest))
		}},
		{MethodName: "NotifyRegistrationStatus", Handler: func(r any, _ context.Context,
			decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			message := status.New(codes.OK, "").Proto()
			if err := decode(message); err != nil {
				return nil, err
			}
			r.(*registration).notified(message.Code != 0, message.Message)
			return new(csi.ProbeRequest), nil // RegistrationStatusResponse has no fields
		}},
	},
}

// The metrics that the driver counts, by name.
const (
	publishTotal          = "connectors_csi_publish_total"
	unpublishTotal        = "connectors_csi_unpublish_total"
	pushesTotal           = "connectors_csi_pushes_total"
	apiRequestsTotal      = "connectors_csi_api_requests_total"
	templateFailuresTotal = "connectors_csi_template_failures_total"
	rendererLimitsTotal   = "connectors_csi_renderer_limits_total"
	watchesOpen           = "connectors_csi_watches"
	publishDuration       = "connectors_csi_publish_duration_seconds"
	pushDuration          = "connectors_csi_push_duration_seconds"
)

// metrics are the driver's own, in the text format of Prometheus. Labels never hold names of users' objects.
type metrics struct {
	budget *budget

	mu         sync.Mutex                  // guards the rest
	values     map[string]map[string]int64 // of counters and gauges, by their labels as they are written
	histograms map[string]*histogram
}

// histogram counts durations.
type histogram struct {
	buckets [len(durationBuckets)]int64 // how many took at most each limit
	seconds float64                     // of all together
}

// durationBuckets are the upper limits of the buckets, in seconds.
var durationBuckets = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60,
	math.Inf(1)}

// newMetrics begins at zero with those whose labels are known.
func newMetrics(b *budget) *metrics {
	return &metrics{
		budget: b,
		values: map[string]map[string]int64{
			publishTotal: {}, unpublishTotal: {}, pushesTotal: {}, apiRequestsTotal: {}, rendererLimitsTotal: {},
			templateFailuresTotal: {"{}": 0}, watchesOpen: {"": 0},
			"connectors_csi_build_info": {fmt.Sprintf("{version=%q}", version): 1},
		},
		histograms: map[string]*histogram{publishDuration: {}, pushDuration: {}},
	}
}

// inc counts one event; the labels are names and values in turn.
func (m *metrics) inc(counter string, labels ...string) {
	var pairs []string
	for pair := range slices.Chunk(labels, 2) {
		pairs = append(pairs, fmt.Sprintf("%s=%q", pair[0], pair[1]))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[counter]["{"+strings.Join(pairs, ",")+"}"]++
}

// add adds to a gauge.
func (m *metrics) add(gauge string, number int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[gauge][""] += number
}

// observe adds a duration to a histogram.
func (m *metrics) observe(name string, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.histograms[name]
	h.seconds += took.Seconds()
	first, _ := slices.BinarySearch(durationBuckets[:], took.Seconds())
	for i := first; i < len(h.buckets); i++ {
		h.buckets[i]++
	}
}

// text gives all metrics in the text format of Prometheus, always in the same order.
func (m *metrics) text() string {
	var b strings.Builder
	volumes, used := m.budget.usage()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values["connectors_csi_volumes"] = map[string]int64{"": int64(volumes)}
	m.values["connectors_csi_volumes_bytes"] = map[string]int64{"": used}
	m.values["connectors_csi_volumes_budget_bytes"] = map[string]int64{"": m.budget.limit}
	for _, name := range slices.Sorted(maps.Keys(m.values)) {
		kind := "gauge"
		if strings.HasSuffix(name, "_total") {
			kind = "counter"
		}
		fmt.Fprintf(&b, "# TYPE %s %s\n", name, kind)
		for _, labels := range slices.Sorted(maps.Keys(m.values[name])) {
			fmt.Fprintf(&b, "%s%s %d\n", name, labels, m.values[name][labels])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(m.histograms)) {
		h := m.histograms[name]
		fmt.Fprintf(&b, "# TYPE %s histogram\n", name)
		for i, number := range h.buckets {
			fmt.Fprintf(&b, "%s_bucket{le=\"%g\"} %d\n", name, durationBuckets[i], number)
		}
		fmt.Fprintf(&b, "%s_sum %g\n%s_count %d\n", name, h.seconds, name, h.buckets[len(h.buckets)-1])
	}
	return b.String()
}
