package main

// The tests of the driver. None of its parts is replaced: every test speaks gRPC to the driver's socket, as kubelet
// does, the driver speaks HTTPS to an API server of the test, which checks tokens and permissions, and what it
// mounts is looked at from outside. The test binary starts itself again in a mount namespace of its own, and in a
// user namespace as well where it is not root, so that it needs no privilege and leaves nothing behind.
//
// They stand in the order of the files, and after them what they are made with:
//
//	main.go    The process
//	           Kubelet's registration, and what the driver serves over HTTP
//	           The command render
//	csi.go     The contract of a volume
//	           Errors that a user can meet
//	           Several Connectors, parameters, exclusions, built-in files
//	kube.go    Refresh and tokens
//	           Watches and pushes
//	render.go  Rendering
//	           The documented ConnectorClasses
//	           The renderer
//	           What a renderer can do
//	           Renderers that die, and renderers that lie
//	           Turns at the renderers
//	mount.go   The mount
//	           Memory of volumes
//	           Killed and started again
//	all of it  Random input
//	           Figures
//	           The module
//	           The API server, the node, its Pods and volumes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

const (
	// roleKey is the environment variable that tells the test binary what it runs as.
	roleKey    = "CONNECTORS_CSI_TEST_ROLE"
	roleTests  = "tests"  // inside the namespaces
	roleWorker = "worker" // inside them too, and they are set up: a process of a fuzz test
	roleDriver = "driver" // the driver itself, by main()

	kubeletRoot  = "/run/k" // a shared mount, as kubelet's directory is; short, since it holds sockets
	containerDir = "/run/c" // where the tests mount volumes as a container runtime does

	apiAudience = "https://kubernetes.default.svc.cluster.local"
	driverUser  = "connectors-system/connectors-csi"
)

// ---- The process ----

func TestStartUpFailures(t *testing.T) {
	n := newNode(t)
	notShared := t.TempDir()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer busy.Close()
	inTheWay := n.dir + "/inTheWay"
	must(t, os.MkdirAll(inTheWay+"/pods", 0o755))
	must(t, os.MkdirAll(inTheWay+"/plugins_registry/connectors-csi-reg.sock", 0o755))
	must(t, os.MkdirAll(n.dir+"/noRegistry/pods", 0o755))
	for what, c := range sorted(map[string]struct {
		environment []string
		arguments   []string
		word        string
	}{
		"no node name":          {[]string{"NODE_NAME="}, nil, "no node name: set NODE_NAME"},
		"no API server":         {[]string{"KUBERNETES_SERVICE_HOST="}, nil, "KUBERNETES_SERVICE_HOST"},
		"not shared":            {nil, []string{"--kubelet-dir=" + notShared}, "not on a shared mount"},
		"no budget":             {nil, []string{"--volumes-budget=0"}, "--volumes-budget 0 must be above zero"},
		"no such interval":      {nil, []string{"--refresh-interval=0s"}, "--refresh-interval 0s must be above zero"},
		"argument":              {nil, []string{"start"}, `unexpected argument "start"`},
		"port in use":           {nil, []string{"--http-address=" + busy.Addr().String()}, "address already in use"},
		"no socket in its way":  {nil, []string{"--kubelet-dir=" + inTheWay}, "exists and is not a socket"},
		"no registry directory": {nil, []string{"--kubelet-dir=" + n.dir + "/noRegistry"}, "mount kubelet's plugins_registry directory"},
	}) {
		t.Run(what, func(t *testing.T) {
			p := n.run(rendererBinary(), c.environment, append([]string{"--kubelet-dir=" + n.dir, "--http-address=127.0.0.1:0"}, c.arguments...)...)
			p.wantFailure(t, c.word)
		})
	}
	for _, file := range []string{"ca.crt", "token"} {
		t.Run("no "+file, func(t *testing.T) {
			path := filepath.Join(serviceAccountDir, file)
			must(t, os.Rename(path, path+".away"))
			defer os.Rename(path+".away", path)
			n.run(rendererBinary(), nil, "--kubelet-dir="+n.dir).wantFailure(t, "no ServiceAccount")
		})
	}
	t.Run("ca.crt without a certificate", func(t *testing.T) {
		path := filepath.Join(serviceAccountDir, "ca.crt")
		must(t, os.Rename(path, path+".away"))
		defer os.Rename(path+".away", path)
		must(t, os.WriteFile(path, []byte("none"), 0o644))
		n.run(rendererBinary(), nil, "--kubelet-dir="+n.dir).wantFailure(t, "no certificate in")
	})
}

// wantFailure waits for the process's end, with exit code 1 and one line.
func (p *process) wantFailure(t *testing.T, word string) {
	t.Helper()
	p.awaitExit(t)
	if log := p.log.String(); p.ProcessState.ExitCode() != 1 || strings.Count(log, "\n") != 1 || !strings.HasPrefix(log, "connectors-csi: ") || !strings.Contains(log, word) {
		t.Errorf("exit code %d, and no single line with %q: %q", p.ProcessState.ExitCode(), word, log)
	}
}

func TestShutdownFinishesWhatIsUnderWay(t *testing.T) {
	n := newNode(t)
	p := n.startProcess()
	mounted, v := n.volume(), n.volume()
	mounted.mustPublish()
	gate := n.api.hold("/connectors/")
	result := make(chan error)
	go func() { result <- v.publish() }()
	eventually(t, "the publish is under way", func() bool { return gate.waiting.Load() == 1 })
	must(t, p.Process.Signal(syscall.SIGTERM))
	eventually(t, "the socket is removed", func() bool { _, err := os.Lstat(n.socket()); return errors.Is(err, fs.ErrNotExist) })
	gate.open()
	must(t, <-result)
	p.awaitExit(t)
	if code := p.ProcessState.ExitCode(); code != 0 || !strings.Contains(p.log.String(), "stopped") {
		t.Errorf("exit code %d, log %s", code, p.log)
	}
	for _, v := range []*podVolume{mounted, v} {
		v.want("token", v.pod.token)
	}
}

// One line for a publish that changed something, with Pod, volume, Connector and duration; none for one that did not.
func TestLog(t *testing.T) {
	n := newNode(t)
	p := n.startProcess()
	v, missing := n.volume(), n.volume(attrs{"connector.name": "none"})
	v.mustPublish()
	v.mustPublish()
	v.mustUnpublish()
	v.mustUnpublish()
	missing.mustRefuse(codes.NotFound)
	writable := n.volume()
	writable.change = func(r *csi.NodePublishVolumeRequest) { r.Readonly = false }
	writable.mustRefuse(codes.InvalidArgument)
	var lines []string
	eventually(t, "four lines", func() bool {
		lines = slices.DeleteFunc(strings.Split(p.log.String(), "\n"), func(l string) bool { return !strings.Contains(l, "publish") })
		return len(lines) >= 4 && strings.HasSuffix(p.log.String(), "\n")
	})
	for i, words := range [][]string{
		{"level=INFO msg=publish", "pod=default/" + v.pod.name, "volume=config", "default/git", "duration="},
		{"level=INFO msg=unpublish", "pod=default/" + v.pod.name, "volume=", "duration="},
		{"level=ERROR msg=publish", "pod=default/" + missing.pod.name, "default/none", "code=NotFound", "duration="},
		{"level=ERROR msg=publish", "pod=default/" + writable.pod.name, "code=InvalidArgument", "duration="},
	} {
		for _, word := range words {
			if !strings.Contains(lines[i], word) {
				t.Errorf("no %q in line %d: %q", word, i, lines[i])
			}
		}
	}
	if len(lines) != 4 {
		t.Errorf("lines %q", lines)
	}
}

// Whatever a user writes, the log and the error hold no more than a little of it.
func TestLogOfLargeRequests(t *testing.T) {
	n := startNode(t)
	long := strings.Repeat("x", 30<<10)
	quotes := strings.Repeat("\"\x01\n", 10<<10)
	names := strings.Repeat(strings.Repeat("x", 62)+".", 3) + strings.Repeat("x", 60)
	for what, c := range sorted(map[string]struct {
		attributes attrs
		change     func(*csi.NodePublishVolumeRequest)
	}{
		"Connector":         {attrs{"connector.name": long}, nil},
		"namespace":         {attrs{"connector.namespace": long}, nil},
		"Connectors":        {attrs{"connector.name": "-", "connectors": numbered(names+"-", 32)}, nil},
		"many Connectors":   {attrs{"connector.name": "-", "connectors": numbered("x", 4000)}, nil},
		"twice":             {attrs{"connector.name": "-", "connectors": names + "," + names}, nil},
		"configuration":     {attrs{"configuration.names": long}, nil},
		"control":           {attrs{"configuration.names": quotes}, nil},
		"long names":        {attrs{"configuration.names": numbered(names, 64)}, nil},
		"exclusions":        {attrs{"configuration.names": "config,!" + names}, nil},
		"params":            {attrs{"configuration.params": `{"` + long + `": {}}`}, nil},
		"params of long":    {attrs{"configuration.names": numbered(names, 64), "configuration.params": `{"y": {}}`}, nil},
		"expiration":        {attrs{"token.expiration": long}, nil},
		"quotes":            {attrs{"token.expiration": quotes}, nil},
		"key":               {attrs{long: ""}, nil},
		"large key":         {attrs{long + long: quotes}, nil},
		"enumeration":       {attrs{"configuration.names": "enum", "configuration.params": `{"enum":{"p":"` + long + `"}}`}, nil},
		"name of the Pod":   {nil, podInfo("pod.name", long+long)},
		"namespace of it":   {nil, podInfo("pod.namespace", quotes)},
		"ephemeral":         {nil, podInfo("ephemeral", long)},
		"file system":       {nil, fsType(long)},
		"mount flags":       {nil, mountFlags(long, long)},
		"group":             {nil, group(long)},
		"target path":       {nil, func(r *csi.NodePublishVolumeRequest) { r.TargetPath += long }},
		"a kubelet's Pod":   {attrs{"connector.name": "none"}, podInfo("serviceAccount.name", long)},
		"not what is asked": {attrs{"y": ""}, podInfo("pod.name", long)},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume(c.attributes)
			v.change = c.change
			logged := len(logs.String())
			err := v.publish()
			line := logs.String()[logged:]
			if err == nil || strings.Contains(err.Error(), strings.Repeat("x", 201)) {
				t.Errorf("the error is %v", err)
			}
			if len(line) > 4<<10 || !strings.Contains(line, "msg=publish") || strings.Contains(line, strings.Repeat("x", 201)) {
				t.Errorf("%d bytes in the log: %s", len(line), line)
			}
		})
	}
}

// ---- Kubelet's registration, and what the driver serves over HTTP ----

// rawCodec passes messages as the bytes that they are on the wire.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

// callRegistration calls kubelet's registration API, as kubelet does after it has found the socket.
func (n *node) callRegistration(method string, request []byte) []byte {
	n.t.Helper()
	var reply []byte
	must(n.t, n.conn.Invoke(context.Background(), "/pluginregistration.Registration/"+method, &request, &reply, grpc.ForceCodecV2(rawCodec{})))
	return reply
}

// decodeStrings reads a protobuf message whose fields are all strings.
func decodeStrings(t *testing.T, message []byte) map[uint64][]string {
	t.Helper()
	fields := map[uint64][]string{}
	for len(message) > 0 {
		tag, n := binary.Uvarint(message)
		length, m := binary.Uvarint(message[max(n, 0):])
		if n <= 0 || m <= 0 || tag&7 != 2 || length > uint64(len(message)-n-m) {
			t.Fatalf("not a message of strings: %x", message)
		}
		message = message[n+m:]
		fields[tag>>3] = append(fields[tag>>3], string(message[:length]))
		message = message[length:]
	}
	return fields
}

func (n *node) wantReady(code int, text string) {
	n.t.Helper()
	if got, body := n.get("/readyz"); got != code || !strings.Contains(body, text) {
		n.t.Errorf("/readyz answers %d %q, not %d %q", got, body, code, text)
	}
}

func TestRegistration(t *testing.T) {
	n := startNode(t)
	n.wantReady(503, "kubelet has not registered the driver yet")

	info := decodeStrings(t, n.callRegistration("GetInfo", nil))
	if want := (map[uint64][]string{1: {"CSIPlugin"}, 2: {"connectors-csi"}, 4: {"1.0.0"}}); fmt.Sprint(info) != fmt.Sprint(want) {
		t.Errorf("PluginInfo is %v, not %v", info, want)
	}
	failed := append([]byte{8, 0, 2<<3 | 2, 4}, "nope"...)
	if reply := n.callRegistration("NotifyRegistrationStatus", failed); len(reply) > 0 {
		t.Errorf("the answer has fields: %x", reply)
	}
	n.wantReady(503, "not registered")
	registered := []byte{8, 1}
	n.callRegistration("NotifyRegistrationStatus", registered)
	n.wantReady(200, "ok")
	n.callRegistration("NotifyRegistrationStatus", failed)
	n.wantReady(503, "not registered")
	n.callRegistration("NotifyRegistrationStatus", registered)
	n.wantReady(200, "ok")
	if !strings.Contains(logs.String(), "error=nope") {
		t.Error("what kubelet said is not in the log")
	}

	v := n.volume()
	v.mustPublish()
	for what, harm := range sorted(map[string]func() error{
		"removed": func() error { return os.Remove(n.socket()) }, // somebody cleans up
		"replaced": func() error { // another process of the driver was started and killed
			other, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket() + ".other"})
			must(t, err)
			other.SetUnlinkOnClose(false)
			return errors.Join(other.Close(), os.Rename(n.socket()+".other", n.socket()))
		},
	}) {
		must(t, harm())
		n.wantReady(503, "")
		eventually(t, "the socket that was "+what+" serves again", func() bool {
			conn, err := net.Dial("unix", n.socket())
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
		n.wantReady(503, "kubelet has not registered the driver yet")
		n.conn.Close()
		n.dial()
		n.callRegistration("NotifyRegistrationStatus", registered)
		n.wantReady(200, "ok")
	}
	v.mustUnpublish()

	for _, malformed := range []struct {
		request []byte
		code    codes.Code
		text    string
	}{
		{[]byte{8}, codes.Internal, "failed to unmarshal"},                            // no value
		{[]byte{1<<3 | 5, 1, 0, 0, 0}, codes.Unknown, "malformed RegistrationStatus"}, // a fixed32
	} {
		err := n.conn.Invoke(t.Context(), "/pluginregistration.Registration/NotifyRegistrationStatus", &malformed.request, &[]byte{},
			grpc.ForceCodecV2(rawCodec{}))
		wantError(t, err, malformed.code, malformed.text)
	}
}

func TestSocket(t *testing.T) {
	n := newNode(t)
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: n.socket()})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	stale.Close() // as a killed process leaves it
	n.start()
	info, err := os.Lstat(n.socket())
	must(t, err)
	if info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("the socket has mode %v", info.Mode())
	}
	if code, body := n.get("/healthz"); code != 200 {
		t.Errorf("/healthz answers %d %q", code, body)
	}
	n.stop()
	if _, err := os.Lstat(n.socket()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// A new volume, other files in it, its end and a renderer's life need no more than what the driver keeps, also where
// renderers have no user namespace. One that could not be confined as usual would be missed in the log.
func TestDriverGivesUpCapabilities(t *testing.T) {
	limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	must(t, err)
	missing := ""
	switch {
	case string(limit) == "0\n":
		missing = "a user namespace"
	case !mayChooseUser(t): // to map root alone takes CAP_SETFCAP, which no driver on a node needs
		missing = confinements[len(confinements)-1].missing
	default:
		t.Run("without user namespaces", runWithoutUserNamespaces)
	}
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	v.change = group("0")
	if mayChooseUser(t) {
		v.change = group("1234")
	}
	v.mustPublish()
	n.api.put(class("git", configuration("config", "file", "other")))
	v.mustPublish()
	v.wantFiles("file")
	v.mustUnpublish()
	if warned := regexp.MustCompile(`missing="(.*?)"`).FindStringSubmatch(p.log.String() + ` missing=""`); warned[1] != missing {
		t.Errorf("renderers lack %q, not %q: %s", warned[1], missing, p.log)
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.Process.Pid))
	must(t, err)
	if len(threads) == 0 {
		t.Fatal("the driver has no threads")
	}
	kept := fmt.Sprintf("%016x", neededCapabilities)
	for _, thread := range threads {
		id, err := strconv.Atoi(filepath.Base(thread))
		must(t, err)
		for _, want := range [][2]string{
			{"CapEff", kept}, {"CapPrm", kept}, {"CapBnd", kept}, {"CapInh", "0000000000000000"}, {"CapAmb", "0000000000000000"},
			{"NoNewPrivs", "1"},
		} {
			if is := processStatus(t, id, want[0]); is != want[1] { // of a thread, as of a process
				t.Errorf("thread %d has %s %s, not %s", id, want[0], is, want[1])
			}
		}
	}
	must(t, p.Process.Signal(syscall.SIGTERM))
	p.awaitExit(t) // after its renderer's end
}

// runWithoutUserNamespaces runs the test that it is part of once more, in a user namespace that may have no other.
func runWithoutUserNamespaces(t *testing.T) {
	test, _, _ := strings.Cut(t.Name(), "/")
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command("sh", "-c", `echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"`, "sh", self, "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), roleKey+"="+roleTests)
	all := []syscall.SysProcIDMap{{Size: 1 << 16}} // as many as a container has, at least
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: all, GidMappings: all,
		GidMappingsEnableSetgroups: true, Pdeathsig: syscall.SIGKILL}
	if output, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, output)
	}
}

func TestHealthNeedsTheSocket(t *testing.T) {
	n := startNode(t)
	conn, err := grpc.NewClient("unix:"+n.dir+"/none", grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	web := httptest.NewServer(webHandler(&registration{socket: n.dir + "/none"}, csi.NewIdentityClient(conn), n.driver.metrics))
	defer web.Close()
	for path, want := range sorted(map[string]int{"/healthz": 503, "/readyz": 503, "/metrics": 200, "/": 404}) {
		response, err := http.Get(web.URL + path)
		must(t, err)
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("%s answers %d, not %d", path, response.StatusCode, want)
		}
	}
}

var metricLine = regexp.MustCompile(`^([a-z_]+)(\{(?:[a-z]+="[^"]*"(?:,[a-z]+="[^"]*")*)?\})? (\S+)$`)

// readMetrics reads the text format of Prometheus: each sample belongs to the type line before it.
func (n *node) readMetrics() map[string]float64 {
	n.t.Helper()
	code, body := n.get("/metrics")
	if code != 200 {
		n.t.Fatalf("/metrics answers %d", code)
	}
	samples, family := map[string]float64{}, ""
	for line := range strings.Lines(body) {
		line = strings.TrimSuffix(line, "\n")
		if f := strings.Fields(line); strings.HasPrefix(line, "# TYPE ") && len(f) == 4 {
			family = f[2]
			continue
		}
		match := metricLine.FindStringSubmatch(line)
		if match == nil || family == "" || !strings.HasPrefix(match[1], family) {
			n.t.Fatalf("not a sample of %s: %q", family, line)
		}
		value, err := strconv.ParseFloat(match[3], 64)
		must(n.t, err)
		samples[match[1]+match[2]] = value
	}
	return samples
}

func TestMetrics(t *testing.T) {
	n := startPolling(t)
	v, w := n.volume(), n.volume()
	v.mustPublish()
	v.mustPublish()
	w.mustPublish()
	missing := n.volume(attrs{"connector.name": "none"})
	missing.mustRefuse(codes.NotFound)
	n.volume(attrs{"connector.name": "Bad"}).mustRefuse(codes.InvalidArgument)
	failing := n.volume()
	n.api.put(class("git", configuration("config", "a", "{{ .missing }}")))
	failing.mustRefuse(codes.FailedPrecondition)
	w.mustUnpublish()
	w.mustUnpublish()

	got := n.readMetrics()
	for sample, want := range sorted(map[string]float64{
		`connectors_csi_publish_total{code="OK"}`:                                              3,
		`connectors_csi_publish_total{code="NotFound"}`:                                        1,
		`connectors_csi_publish_total{code="InvalidArgument"}`:                                 1,
		`connectors_csi_publish_total{code="FailedPrecondition"}`:                              1,
		`connectors_csi_publish_duration_seconds_count`:                                        6,
		`connectors_csi_publish_duration_seconds_bucket{le="+Inf"}`:                            6,
		`connectors_csi_unpublish_total{code="OK"}`:                                            2,
		`connectors_csi_api_requests_total{resource="connectors",verb="get",code="200"}`:       3,
		`connectors_csi_api_requests_total{resource="connectors",verb="get",code="404"}`:       1,
		`connectors_csi_api_requests_total{resource="connectorclasses",verb="get",code="200"}`: 3,
		`connectors_csi_template_failures_total{}`:                                             1,
		`connectors_csi_volumes`:                                                               1,
		`connectors_csi_build_info{version="dev"}`:                                             1,
	}) {
		if got[sample] != want {
			t.Errorf("%s is %v, not %v", sample, got[sample], want)
		}
	}
	last := 0.
	for _, limit := range durationBuckets {
		bucket := got[fmt.Sprintf(`connectors_csi_publish_duration_seconds_bucket{le="%v"}`, limit)]
		if bucket < last {
			t.Errorf("the histogram goes down at %v", limit)
		}
		last = bucket
	}
	if got["connectors_csi_publish_duration_seconds_sum"] <= 0 {
		t.Error("the publishes took no time")
	}
	n.api.Close()
	missing.mustRefuse(codes.Unavailable)
	if got := n.readMetrics()[`connectors_csi_api_requests_total{resource="connectors",verb="get",code="none"}`]; got != 1 {
		t.Errorf("%v requests without an answer", got)
	}
}

// ---- The command render ----

// runRender runs the released program with the objects on standard input, one after the other.
func runRender(t *testing.T, objects []object, arguments ...string) (stdout, stderr string, exitCode int) {
	t.Helper()
	return runPreview(t, exec.Command(rendererBinary(), append([]string{"render"}, arguments...)...), objects)
}

func runPreview(t *testing.T, cmd *exec.Cmd, objects []object) (stdout, stderr string, exitCode int) {
	t.Helper()
	var in, out, errors bytes.Buffer
	for _, o := range objects {
		must(t, json.NewEncoder(&in).Encode(o))
	}
	cmd.Env = []string{roleKey + "=" + roleDriver}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &errors
	cmd.Run()
	return out.String(), errors.String(), cmd.ProcessState.ExitCode()
}

func TestPreview(t *testing.T) {
	git := class("git", configuration("config", ".gitconfig", "{{ .connector.spec.address }} {{ .context.token }}\n"), configuration("two", "a", "A", "b", "B\n"),
		configuration("params", "p", "{{ .configurations.x }}"), configuration("names", "n", "{{ range .connectors }}{{ .metadata.namespace }}/{{ .name }} {{ end }}"))
	one, two := connector("team-a", "one", "git"), connector("team-b", "two", "git")
	unnamed := connector("", "unnamed", "git")
	delete(unnamed["metadata"].(object), "namespace")
	longNamespace, longName := strings.Repeat("n", 63), strings.Repeat("c", 253)
	long := connector(longNamespace, longName, "git")
	list := func(objects ...any) object { return object{"kind": "List", "apiVersion": "v1", "items": objects} }
	tokenFile := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(tokenFile, []byte("the-token\n"), 0o600))
	for _, c := range []struct {
		what      string
		objects   []object
		arguments []string
		stdout    string
	}{
		{"one file", []object{git, one}, []string{"--configuration.names=config"}, "https://one.example.com TOKEN\n"},
		{"a list", []object{list(git, one)}, []string{"--configuration.names", "config"}, "https://one.example.com TOKEN\n"},
		{"a list of lists, and other kinds", []object{list(list(git), one), {"kind": "Pod", "metadata": object{"name": "x"}}}, []string{"--configuration.names=config"}, "https://one.example.com TOKEN\n"},
		{"several files", []object{git, one}, []string{"--configuration.names=two"}, "==> a <==\nA\n==> b <==\nB\n"},
		{"a token", []object{one, git}, []string{"--configuration.names=config", "--token-file", tokenFile}, "https://one.example.com the-token\n"},
		{"all Connectors in their order", []object{two, git, one, two}, []string{"--configuration.names=names"}, "team-b/two team-a/one "},
		{"a Connector of the first one's namespace", []object{two, git, one}, []string{"--configuration.names=names", "--connector.name=two"}, "team-b/two "},
		{"a Connector of the Pod's namespace", []object{two, git, one}, []string{"--configuration.names=names", "--connector.name=one", "--namespace=team-a"}, "team-a/one "},
		{"Connectors", []object{two, git, one}, []string{"--configuration.names=names", "--connectors=team-a/one"}, "team-a/one "},
		{"a Connector without a namespace", []object{git, unnamed}, []string{"--configuration.names=names"}, "default/unnamed "},
		{"and with the Pod's", []object{git, unnamed}, []string{"--configuration.names=names", "--namespace=team-c"}, "team-c/unnamed "},
		{"the longest names", []object{git, long}, []string{"--configuration.names=names"}, longNamespace + "/" + longName + " "},
		{"parameters", []object{git, one}, []string{"--configuration.names=params", `--configuration.params={"params":{"x":"y"}}`}, "y"},
		{"built-in files", []object{git, one}, []string{"--builtin-files", "--configuration.names=!.curlrc,!.env,!connector.status.proxyAddress,!http.proxy,!https.proxy"}, "TOKEN"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if stdout, stderr, code := runRender(t, c.objects, c.arguments...); stdout != c.stdout || stderr != "" || code != 0 {
				t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
			}
		})
	}

	dir := filepath.Join(t.TempDir(), "new")
	if stdout, stderr, code := runRender(t, []object{git, one}, "--configuration.names=two", "--output-dir", dir); stdout+stderr != "" || code != 0 {
		t.Errorf("exit code %d, %q, %q", code, stdout, stderr)
	}
	for name, want := range sorted(map[string]string{"a": "A", "b": "B\n"}) {
		if text, err := os.ReadFile(filepath.Join(dir, name)); string(text) != want {
			t.Errorf("%s is %q, %v", name, text, err)
		}
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != 0o600 { // it may hold a token
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}

	for _, c := range []struct {
		what      string
		objects   []object
		arguments []string
		stderr    string
	}{
		{"no input", nil, []string{"--configuration.names=config"}, "there is no Connector on standard input"},
		{"no Connector", []object{git}, []string{"--configuration.names=config"}, "there is no Connector on standard input"},
		{"no class", []object{one}, []string{"--configuration.names=config"}, `ConnectorClass "git" of Connector "team-a/one" cannot be read: it is not in the input`},
		{"another Connector", []object{git, one}, []string{"--configuration.names=config", "--connector.name=none"}, `Connector "team-a/none" cannot be read: it is not in the input`},
		{"no name", []object{git, {"kind": "Connector", "metadata": object{}}}, []string{"--configuration.names=config"}, "a Connector on standard input has no metadata.name"},
		{"no configuration", []object{git, one}, nil, "configuration.names is missing"},
		{"an attribute too much", []object{git, one}, []string{"--configuration.names=config", "--connectors=a", "--connector.name=b"}, "cannot be combined"},
		{"an argument too much", []object{git, one}, []string{"--configuration.names=config", "more"}, `unexpected argument "more"`},
		{"an empty token", []object{git, one}, []string{"--configuration.names=config", "--token-file=/dev/null"}, "there is no token in /dev/null"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if stdout, stderr, code := runRender(t, c.objects, c.arguments...); !strings.HasPrefix(stderr, "connectors-csi: ") || !strings.Contains(stderr, c.stderr) || stdout != "" || code != 1 {
				t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
			}
		})
	}
}

// The command says what a Pod's events would say.
func TestPreviewRefusesAsAPublishDoes(t *testing.T) {
	n := startNode(t)
	for what, change := range sorted(map[string]struct{ class, connector object }{
		"a missing value":   {class("git", configuration("config", "a", "x\n{{ .connector.spec.typo }}")), connector("default", "git", "git")},
		"no configuration":  {class("git", configuration("other")), connector("default", "git", "git")},
		"too much memory":   {class("git", configuration("config", "a", `{{ repeat 1000000000 "x" }}`)), connector("default", "git", "git")},
		"an address":        {gitClass(), connector("default", "git", "git", with("a b", "spec", "address"))},
		"an audience":       {gitClass(), connector("default", "git", "git", with("vault", "status", "proxy", "httpAddress", "audience"))},
		"no class name":     {gitClass(), connector("default", "git", "")},
		"too large":         {gitClass(), connector("default", "git", "git", padded(4<<20))},
		"a bad file name":   {class("git", configuration("config", "../a", "x")), connector("default", "git", "git")},
		"a large volume":    {class("git", configuration("config", "a", `{{ repeat 1048577 "x" }}`)), connector("default", "git", "git")},
		"no configurations": {class("git"), connector("default", "git", "git")},
	}) {
		t.Run(what, func(t *testing.T) {
			n.api.put(change.class, change.connector)
			published := status.Convert(n.volume().publish()).Message()
			_, stderr, code := runRender(t, []object{change.class, change.connector}, "--configuration.names=config")
			said := strings.TrimSuffix(strings.TrimPrefix(stderr, "connectors-csi: "), "\n")
			limit := regexp.MustCompile("takes more than .*") // which of them depends on how busy the machine is
			if published == "" || code != 1 || limit.ReplaceAllString(said, "") != limit.ReplaceAllString(published, "") {
				t.Errorf("exit code %d\nthe command:  %s\nthe publish: %s", code, said, published)
			}
		})
	}
}

// Where a container's rules or the kernel refuse namespaces, the limits hold all the same.
func TestWithoutNamespaces(t *testing.T) {
	git, one := class("git", configuration("config", "a", "A"), configuration("large", "a", `{{ repeat 1000000000 "x" }}`)), connector("default", "one", "git")
	preview := func(name string) (stdout, stderr string, code int) {
		script := `for n in user mnt net pid ipc; do echo 0 > /proc/sys/user/max_${n}_namespaces || exit 9; done; exec "$@"`
		cmd := exec.Command("sh", "-c", script, "sh", rendererBinary(), "render", "--configuration.names="+name)
		ids := []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
		return runPreview(t, cmd, []object{git, one})
	}
	if stdout, stderr, code := preview("config"); stdout != "A" || stderr != "" || code != 0 {
		t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
	}
	if _, stderr, code := preview("large"); !strings.Contains(stderr, "rendering it takes more than 64 MiB of memory") || code != 1 {
		t.Errorf("exit code %d, and on standard error %q", code, stderr)
	}
}

func TestVersionAndHelp(t *testing.T) {
	run := func(argument ...string) string {
		cmd := exec.Command(rendererBinary(), argument...)
		cmd.Env = []string{roleKey + "=" + roleDriver}
		out, _ := cmd.CombinedOutput()
		return string(out)
	}
	if got := run("--version"); got != "dev\n" {
		t.Errorf("--version prints %q", got)
	}
	for _, want := range []string{"connectors-csi [flags]", "connectors-csi render [flags]", "-kubelet-dir"} {
		if got := run("--help"); !strings.Contains(got, want) {
			t.Errorf("--help does not say %q: %s", want, got)
		}
	}
	for _, want := range []string{"-configuration.names", "-connectors", "-namespace", "-token-file", "-output-dir", "-builtin-files"} {
		if got := run("render", "--help"); !strings.Contains(got, want) {
			t.Errorf("render --help does not say %q: %s", want, got)
		}
	}
}

// ---- The contract of a volume ----

func TestPublishMountsTheDocumentedExample(t *testing.T) {
	n := startNode(t)
	v := n.volume(attrs{"connector.name": "git", "connector.namespace": "default", "configuration.names": "config"})
	v.mustPublish()
	v.wantFiles(".gitconfig", "mark", "token")
	v.want("token", v.pod.token)
	v.want(".gitconfig", "[http]\n\textraHeader = Authorization: Basic "+base64.StdEncoding.EncodeToString([]byte(":"+v.pod.token))+
		"\n[url \"http://c-git.default.svc.cluster.local\"]\n\tinsteadOf = https://git.example.com\n")
	v.mustUnpublish()
}

func TestAttributesAccepted(t *testing.T) {
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"), connector("team-a", "with.dots-1", "git"))
	for what, attributes := range sorted(map[string]attrs{
		"namespace":                     {"connector.namespace": "team-a"},
		"name with dots":                {"connector.namespace": "team-a", "connector.name": "with.dots-1"},
		"empty namespace is the Pod's":  {"connector.namespace": ""},
		"empty values are as no values": {"connectors": "", "configuration.params": "", "token.expiration": ""},
		"spaces around names":           {"configuration.names": " config ,  first "},
		"empty items":                   {"configuration.names": ",config,,"},
		"connectors":                    {"connector.name": "-", "connectors": "git"},
		"connectors with namespace":     {"connector.name": "", "connectors": " team-a/git , git"},
		"the default expiration":        {"token.expiration": "30m"},
		"an equal one":                  {"token.expiration": "0.5h"},
		"less than a second more":       {"token.expiration": "30m0.9s"},
		"params that are null":          {"configuration.params": `{"config": null, "another": null}`},
		"as many bytes as possible":     {"configuration.params": strings.Repeat(" ", 32<<10-2-len("connector.namegitconfiguration.namesconfigconfiguration.params")) + "{}"},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume(attributes)
			v.t = t
			v.mustPublish()
			v.want("token", v.pod.token)
			v.mustUnpublish()
		})
	}
}

func TestAttributesRefused(t *testing.T) {
	n := startNode(t)
	for what, c := range sorted(map[string]struct {
		attributes attrs
		words      []string
	}{
		"no Connector":          {attrs{"connector.name": "-"}, []string{"connectors or connector.name is required"}},
		"empty Connector":       {attrs{"connector.name": ""}, []string{"connectors or connector.name is required"}},
		"list of nothing":       {attrs{"connector.name": "-", "connectors": " , "}, []string{"connectors or connector.name is required"}},
		"both ways":             {attrs{"connectors": "git"}, []string{"connectors cannot be combined with connector.name"}},
		"list and namespace":    {attrs{"connector.name": "-", "connectors": "git", "connector.namespace": "default"}, []string{"cannot be combined"}},
		"the same twice":        {attrs{"connector.name": "-", "connectors": "git,default/git"}, []string{`"default/git" twice`}},
		"no configuration":      {attrs{"configuration.names": "-"}, []string{"configuration.names is missing"}},
		"empty configuration":   {attrs{"configuration.names": ""}, []string{"configuration.names is missing"}},
		"only spaces":           {attrs{"configuration.names": " , "}, []string{"configuration.names is missing"}},
		"only exclusions":       {attrs{"configuration.names": "!token"}, []string{"configuration.names is missing"}},
		"singular":              {attrs{"configuration.name": "config"}, []string{`"configuration.name"`, `did you mean "configuration.names"?`, "connector.namespace", "token.expiration"}},
		"singular Connector":    {attrs{"connector": "git"}, []string{`did you mean "connectors"?`}},
		"other spelling":        {attrs{"tokenExpiration": "1h"}, []string{`did you mean "token.expiration"?`}},
		"capital":               {attrs{"connector.Name": "git"}, []string{`did you mean "connector.name"?`}},
		"duration without unit": {attrs{"token.expiration": "30"}, []string{`token.expiration "30"`, "10m"}},
		"not a duration":        {attrs{"token.expiration": "long"}, []string{`token.expiration "long"`}},
		"short duration":        {attrs{"token.expiration": "9m59s"}, []string{`token.expiration "9m59s"`, "at least 10m"}},
		"negative duration":     {attrs{"token.expiration": "-1h"}, []string{"token.expiration"}},
		"path as name":          {attrs{"connector.name": "../../secrets"}, []string{"DNS names"}},
		"path as namespace":     {attrs{"connector.namespace": ".."}, []string{"DNS names"}},
		"encoded slash":         {attrs{"connector.name": "a%2fb"}, []string{"DNS names"}},
		"query":                 {attrs{"connector.name": "git?watch=1"}, []string{"DNS names"}},
		"capitals":              {attrs{"connector.name": "Git"}, []string{"DNS names"}},
		"space":                 {attrs{"connector.name": "git "}, []string{"DNS names"}},
		"line break":            {attrs{"connector.name": "git\n"}, []string{"DNS names"}},
		"empty label":           {attrs{"connector.name": "a..b"}, []string{"DNS names"}},
		"dash at the end":       {attrs{"connector.name": "git-"}, []string{"DNS names"}},
		"dot in namespace":      {attrs{"connector.namespace": "a.b"}, []string{"DNS names"}},
		"long namespace":        {attrs{"connector.namespace": strings.Repeat("a", 64)}, []string{"DNS names"}},
		"long name":             {attrs{"connector.name": strings.Repeat("a.", 126) + "aa"}, []string{"DNS names"}},
		"paths in the list":     {attrs{"connector.name": "-", "connectors": "default/git/.."}, []string{"DNS names"}},
		"no name in the list":   {attrs{"connector.name": "-", "connectors": "default/"}, []string{"DNS names"}},
		"no namespace":          {attrs{"connector.name": "-", "connectors": "/git"}, []string{"DNS names"}},
		"params no JSON":        {attrs{"configuration.params": "{"}, []string{"configuration.params is not a JSON object"}},
		"params two values":     {attrs{"configuration.params": "{} {}"}, []string{"configuration.params is not a JSON object"}},
		"params list":           {attrs{"configuration.params": `[]`}, []string{"configuration.params is not a JSON object"}},
		"params null":           {attrs{"configuration.params": `null`}, []string{"configuration.params is not a JSON object"}},
		"params string":         {attrs{"configuration.params": `{"config":"x"}`}, []string{`"config" is not a JSON object`}},
		"params of another":     {attrs{"configuration.params": `{"first":{}}`}, []string{`"first"`, "not in configuration.names"}},
		"params too deep": {attrs{"configuration.params": `{"config":` + strings.Repeat("[", 15000) + strings.Repeat("]", 15000) + "}"},
			[]string{"configuration.params is not a JSON object", "exceeded max depth at byte 10010)"}},
		"one byte too many": {attrs{"configuration.params": strings.Repeat(" ", 32<<10-1-len("connector.namegitconfiguration.namesconfigconfiguration.params")) + "{}"},
			[]string{"volumeAttributes may have 32768 bytes, not 32769", `the largest is "configuration.params" with 32727: make it smaller`}},
		"a long key":            {attrs{"connectors" + strings.Repeat("k", 30000): ""}, []string{`unknown attribute "connectors` + strings.Repeat("k", 53) + ` …"`}},
		"33 Connectors":         {attrs{"connector.name": "-", "connectors": numbered("c", 33)}, []string{"connectors may name 32 Connectors, not 33"}},
		"65 configurations":     {attrs{"configuration.names": numbered("c", 65)}, []string{"configuration.names may have 64 configurations and as many exclusions, not 65"}},
		"65 exclusions":         {attrs{"configuration.names": "config," + numbered("!f", 65)}, []string{"configuration.names may have 64 configurations and as many exclusions, not 65"}},
		"a configuration twice": {attrs{"configuration.names": "config, first, config"}, []string{`configuration.names has "config" twice`}},
		"an exclusion twice":    {attrs{"configuration.names": "config,!a,! a"}, []string{`configuration.names has "a" twice`}},
		"long configuration":    {attrs{"configuration.names": strings.Repeat("x", 254)}, []string{"configuration.names: a name may have 253 bytes, not 254"}},
		"more than a day":       {attrs{"token.expiration": "24h0m1s"}, []string{"token.expiration may be at most 24h0m0s, not 24h0m1s"}},
		"45 years":              {attrs{"token.expiration": "400000h"}, []string{"token.expiration may be at most 24h0m0s"}},
		"more than a Duration":  {attrs{"token.expiration": "9999999h"}, []string{`token.expiration "9999999h" is not a duration`}},
		"3607 seconds":          {attrs{"token.expiration": "1h0m7s"}, []string{"token.expiration may not be 1h0m7s", "3607 seconds", "a year"}},
		"nearly 3608 seconds":   {attrs{"token.expiration": "3607.999s"}, []string{"token.expiration may not be 1h0m7s"}},
		"nearly ten minutes":    {attrs{"token.expiration": "9m59.999s"}, []string{"at least 10m"}},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume(c.attributes)
			v.t = t
			v.mustRefuse(codes.InvalidArgument, c.words...)
		})
	}
	if n.api.count("") > 0 {
		t.Error("the API server was asked for one of them")
	}
}

// numbered is a list of so many names.
func numbered(name string, count int) string {
	var names []string
	for i := range count {
		names = append(names, fmt.Sprint(name, i))
	}
	return strings.Join(names, ",")
}

// A volume may have as many names as the limits say.
func TestAsManyNamesAsAllowed(t *testing.T) {
	n := startNode(t)
	var configurations []object
	var files, connectors []string
	for i := range 64 {
		files = append(files, fmt.Sprint("file", i))
		configurations = append(configurations, configuration(fmt.Sprint("c", i), files[i], "x"))
	}
	for i := range 32 {
		connectors = append(connectors, fmt.Sprint("git", i))
		n.api.put(connector("default", connectors[i], "many"))
	}
	n.api.put(class("many", append(configurations, configuration("one", "stays", "{{ len .connectors }}"))...))
	v := n.volume(attrs{"connector.name": "-", "connectors": strings.Join(connectors, ","),
		"configuration.names": "one," + numbered("c", 63) + ",!" + strings.Join(files[:63], ",!")})
	v.mustPublish()
	v.wantFiles("stays")
	v.want("stays", "32")
}

// The limits of new volumes do not end one that is mounted: its Pod would be left with an old token.
func TestMountedVolumesMayHaveMoreThanNewOnes(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	v.attributes["configuration.names"] = "first,config,first,!one,!one" + strings.Repeat(",", 33<<10)
	v.attributes["token.expiration"] = "48h"
	v.change = func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = "ext4" }
	v.mustPublish()
	v.wantFiles(".gitconfig", "mark", "shared", "token")
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 86400. {
		t.Errorf("a token of %v seconds was asked for, not of a day", got)
	}
	other := n.volume(v.attributes)
	other.change = v.change
	other.mustRefuse(codes.InvalidArgument, "fs_type")
}

// A message that is too large never gets into the driver's hands.
func TestLargestMessage(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.Secrets["more"] = strings.Repeat("x", 120<<10) }
	v.mustPublish()
	v.mustUnpublish()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.Secrets["more"] = strings.Repeat("x", 128<<10) }
	v.mustRefuse(codes.ResourceExhausted, "received message larger than max", "131072")
	v.change = nil
	v.mustPublish()
}

// What is kept of a volume is no more than is needed to publish it again.
func TestMemoryOfVolumes(t *testing.T) {
	n := startNode(t)
	held := func() int {
		runtime.GC() // twice, for what is in a sync.Pool
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	large := func(r *csi.NodePublishVolumeRequest) {
		r.Secrets["of nodePublishSecretRef"] = strings.Repeat("x", 80<<10)
		r.VolumeContext["configuration.names"] = "config" + strings.Repeat(",", 30<<10)
		r.PublishContext = attrs{"more": strings.Repeat("x", 10<<10)}
	}
	first := n.volume()
	first.change = large
	first.settle()
	before := held()
	for range 60 {
		v := n.volume()
		v.change = large
		v.settle()
	}
	if grown := held() - before; grown > 1<<20 {
		t.Errorf("60 volumes hold %d KiB", grown>>10)
	}
}

func TestLaterConfigurationWins(t *testing.T) {
	n := startNode(t)
	for names, want := range sorted(map[string]string{"first,second": "from second", "second,first": "from first"}) {
		v := n.volume(attrs{"configuration.names": names})
		v.mustPublish()
		v.wantFiles("one", "shared", "two")
		v.want("shared", want)
	}
}

func TestRequestsRefused(t *testing.T) {
	n := startNode(t)
	other := n.pod()
	for what, c := range sorted(map[string]struct {
		change func(*csi.NodePublishVolumeRequest)
		code   codes.Code
		words  string
	}{
		"not read-only":    {func(r *csi.NodePublishVolumeRequest) { r.Readonly = false }, codes.InvalidArgument, "csi.readOnly: true"},
		"no volume id":     {func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" }, codes.InvalidArgument, "volume_id"},
		"no capability":    {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil }, codes.InvalidArgument, "volume_capability"},
		"block":            {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessType = &csi.VolumeCapability_Block{} }, codes.InvalidArgument, "volume_capability"},
		"group":            {group("staff"), codes.InvalidArgument, `volume_mount_group "staff"`},
		"negative group":   {group("-1"), codes.InvalidArgument, `volume_mount_group "-1"`},
		"too high a group": {group("2147483648"), codes.InvalidArgument, `volume_mount_group "2147483648"`},
		"no access mode":   {func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode = nil }, codes.InvalidArgument, "no access_mode"},
		"unknown mode": {func(r *csi.NodePublishVolumeRequest) {
			r.VolumeCapability.AccessMode.Mode = csi.VolumeCapability_AccessMode_UNKNOWN
		}, codes.InvalidArgument, "no access_mode"},
		"file system":     {fsType("ext4"), codes.InvalidArgument, `fs_type "ext4": the volume is a tmpfs; leave csi.fsType out`},
		"mount flags":     {mountFlags("exec", "dev"), codes.InvalidArgument, `mount_flags "exec": mount options are not supported`},
		"persistent":      {podInfo("ephemeral", "false"), codes.InvalidArgument, `csi.storage.k8s.io/ephemeral is "false": only inline volumes can be mounted`},
		"not ephemeral":   {podInfo("ephemeral", ""), codes.InvalidArgument, `csi.storage.k8s.io/ephemeral is ""`},
		"other Pod":       {podInfo("pod.name", other.name), codes.PermissionDenied, "pod.name"},
		"other namespace": {podInfo("pod.namespace", "kube-system"), codes.PermissionDenied, "pod.namespace"},
		"other uid":       {podInfo("pod.uid", other.uid), codes.PermissionDenied, "pod.uid"},
		"other account":   {podInfo("serviceAccount.name", "admin"), codes.PermissionDenied, "serviceAccount.name"},
		"huge token":      {tokens(`{"":{"token":"` + strings.Repeat("x", 16<<10+1) + `"}}`), codes.InvalidArgument, "more than 16 KiB"},
		"no token":        {tokens(""), codes.FailedPrecondition, "tokenRequests"},
		"no JSON":         {tokens("eyJ"), codes.FailedPrecondition, "tokenRequests"},
		"other audience":  {tokens(`{"vault":{"token":"` + other.token + `"}}`), codes.FailedPrecondition, "tokenRequests"},
		"empty token":     {tokens(`{"":{"token":""}}`), codes.FailedPrecondition, "tokenRequests"},
		"no JWT":          {tokens(`{"":{"token":"secret"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"no base64":       {tokens(`{"":{"token":"a.!.c"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"no claims":       {tokens(`{"":{"token":"e30.e30.e30"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"token of no Pod": {tokens(`{"":{"token":"` + issue("default", "default", nil, time.Hour, apiAudience) + `"}}`), codes.InvalidArgument, "not one of a Pod's ServiceAccount"},
		"another's token": {tokens(`{"":{"token":"` + other.token + `"}}`), codes.PermissionDenied, "the token is that of"},
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			v.t, v.change = t, c.change
			v.mustRefuse(c.code, c.words)
		})
	}
	if n.api.count("") > 0 {
		t.Error("the API server was asked for one of them")
	}
}

func group(gid string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().VolumeMountGroup = gid }
}

func fsType(name string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().FsType = name }
}

func mountFlags(flags ...string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().MountFlags = flags }
}

func podInfo(key, value string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/"+key] = value }
}

func tokens(text string) func(*csi.NodePublishVolumeRequest) {
	return func(r *csi.NodePublishVolumeRequest) {
		r.Secrets = attrs{"csi.storage.k8s.io/serviceAccount.tokens": text}
	}
}

func TestTargetPathsRefused(t *testing.T) {
	n := startNode(t)
	outside := n.dir + "/elsewhere"
	must(t, os.MkdirAll(outside+"/mount", 0o755))
	must(t, os.WriteFile(outside+"/mount/precious", nil, 0o644))
	for what, target := range sorted(map[string]func(string) string{
		"none":            func(string) string { return "" },
		"relative":        func(target string) string { return target[1:] },
		"outside":         func(string) string { return outside + "/mount" },
		"dots to outside": func(target string) string { return filepath.Dir(target) + "/../../../../../elsewhere/mount" },
		"dots that stay":  func(target string) string { return filepath.Dir(target) + "/../config/mount" },
		"trailing slash":  func(target string) string { return target + "/" },
		"double slash":    func(target string) string { return strings.Replace(target, "/volumes", "//volumes", 1) },
		"deeper":          func(target string) string { return target + "/mount" },
		"higher":          filepath.Dir,
		"other plugin": func(target string) string {
			return strings.Replace(target, "kubernetes.io~csi", "kubernetes.io~secret", 1)
		},
		"other last name":   func(target string) string { return filepath.Dir(target) + "/globalmount" },
		"the pods dir":      func(string) string { return n.podsDir() },
		"uid that is a dot": func(target string) string { return n.podsDir() + "/./volumes/kubernetes.io~csi/config/mount" },
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			target := target(v.target)
			v.t, v.change = t, func(r *csi.NodePublishVolumeRequest) { r.TargetPath = target }
			v.mustRefuse(codes.InvalidArgument, "target_path")
			_, err := csi.NewNodeClient(n.conn).NodeUnpublishVolume(t.Context(), &csi.NodeUnpublishVolumeRequest{VolumeId: "csi-1", TargetPath: target})
			wantError(t, err, codes.InvalidArgument, "target_path")
		})
	}
	if _, err := os.Stat(outside + "/mount/precious"); err != nil || len(mountsBelow(n.dir)) > 0 {
		t.Error("a call did something elsewhere:", err, mountsBelow(n.dir))
	}
	v, another := n.volume(), n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) { r.TargetPath = another.target }
	v.mustRefuse(codes.PermissionDenied, "target path", another.pod.uid)
	another.wantNothing()
}

func TestTokenComesFromSecretsBeforeVolumeContext(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	older := v.pod.token
	v.pod.renewToken()
	text := `{"":{"token":"` + older + `"}}`
	v.change = podInfo("serviceAccount.tokens", text)
	v.mustPublish()
	v.want("token", v.pod.token)
	v.change = func(r *csi.NodePublishVolumeRequest) { // an older kubelet
		r.Secrets = nil
		r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = text
	}
	v.mustPublish()
	v.want("token", older)
}

func TestPodInfoMayBeMissing(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.change = func(r *csi.NodePublishVolumeRequest) {
		r.VolumeContext = v.attributes
		fsType("tmpfs")(r)
	}
	v.mustPublish()
	v.want("token", v.pod.token)
}

func TestIdentityAndCapabilities(t *testing.T) {
	n := startNode(t)
	ctx := t.Context()
	identity, nodeClient := csi.NewIdentityClient(n.conn), csi.NewNodeClient(n.conn)
	plugin, err := identity.GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil || plugin.Name != "connectors-csi" || plugin.VendorVersion == "" {
		t.Errorf("plugin info %v, %v", plugin, err)
	}
	capabilities, err := identity.GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil || len(capabilities.Capabilities) != 0 {
		t.Errorf("plugin capabilities %v, %v", capabilities, err)
	}
	info, err := nodeClient.NodeGetInfo(ctx, &csi.NodeGetInfoRequest{})
	if err != nil || info.NodeId != "node-1" {
		t.Errorf("node info %v, %v", info, err)
	}
	node, err := nodeClient.NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil || len(node.Capabilities) != 1 || node.Capabilities[0].GetRpc().GetType() != csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP {
		t.Errorf("node capabilities %v, %v", node, err)
	}
	_, err = nodeClient.NodeGetVolumeStats(ctx, &csi.NodeGetVolumeStatsRequest{})
	wantError(t, err, codes.Unimplemented)
	_, err = nodeClient.NodeStageVolume(ctx, &csi.NodeStageVolumeRequest{})
	wantError(t, err, codes.Unimplemented)
	_, err = nodeClient.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{TargetPath: n.volume().target})
	wantError(t, err, codes.InvalidArgument, "volume_id")
}

// ---- Errors that a user can meet ----

func TestObjectErrors(t *testing.T) {
	for what, c := range sorted(map[string]struct {
		prepare func(*node)
		code    codes.Code
		words   []string
	}{
		"no Connector": {func(n *node) { n.api.remove(connectorPath("default", "git")) }, codes.NotFound,
			[]string{`Connector "default/git" not found`, "create it", "connector.name"}},
		"forbidden": {func(n *node) { n.api.forbid("default/default", connectorPath("default", "git")) }, codes.PermissionDenied,
			[]string{"ServiceAccount default/default may not read", `Connector "default/git"`, `User "system:serviceaccount:default:default" cannot get`,
				"kubectl create rolebinding default-connectors --namespace=default --clusterrole=connectors-connector-viewer-role --serviceaccount=default:default"}},
		"no class": {func(n *node) { n.api.remove(classPath("git")) }, codes.NotFound,
			[]string{`ConnectorClass "git" of Connector "default/git" not found`, "spec.connectorClassName"}},
		"class forbidden": {func(n *node) { n.api.forbid(driverUser, classPath("git")) }, codes.PermissionDenied,
			[]string{`the driver may not read ConnectorClass "git"`, "deploy.yaml"}},
		"no class named": {func(n *node) { n.api.put(connector("default", "git", "git", with(nil, "spec", "connectorClassName"))) }, codes.FailedPrecondition,
			[]string{`Connector "default/git"`, "spec.connectorClassName"}},
		"class named by a path": {func(n *node) { n.api.put(connector("default", "git", "../namespaces/x")) }, codes.FailedPrecondition,
			[]string{"spec.connectorClassName", "../namespaces/x"}},
		"no such configuration": {func(n *node) { n.api.put(class("git", configuration("one"), configuration("two"))) }, codes.InvalidArgument,
			[]string{`configuration "config"`, `ConnectorClass "git" has: one, two`}},
		"no configuration at all": {func(n *node) { n.api.put(class("git")) }, codes.InvalidArgument, []string{`ConnectorClass "git" has: none`}},
		"template does not parse": {func(n *node) { n.api.put(class("git", configuration("config", "a", "ok\n{{ if }}"))) }, codes.FailedPrecondition,
			[]string{`ConnectorClass "git", configuration "config": a line 2: missing value for if`}},
		"unknown function": {func(n *node) { n.api.put(class("git", configuration("config", "a", "{{ getHostByName \"x\" }}"))) }, codes.FailedPrecondition,
			[]string{`"getHostByName" not defined`}},
		"template fails": {func(n *node) { n.api.put(class("git", configuration("config", "a", "1\n2\n{{ fail \"sorry\" }}"))) }, codes.FailedPrecondition,
			[]string{`a line 3, column 3, at <fail "sorry">: sorry`}},
		"missing value": {func(n *node) {
			n.api.put(class("git", configuration("config", "a", "x\n{{ .connector.spec.project }}")))
		}, codes.FailedPrecondition,
			[]string{`ConnectorClass "git", configuration "config": a line 2: {{ .connector.spec.project }} has no value`}},
		"no proxy address": {func(n *node) { n.api.put(connector("default", "git", "git", with(nil, "status"))) }, codes.FailedPrecondition,
			[]string{".gitconfig line 3: {{ .connector.status.proxyAddress }} has no value", "Connector default/git has no proxy address yet", "status.proxy.httpAddress.url", "wait"}},
		"bad file name": {func(n *node) { n.api.put(class("git", configuration("config", "../a", ""))) }, codes.FailedPrecondition,
			[]string{`file name "../a" is not allowed`, "must not begin with '..'"}},
		"too large": {func(n *node) { n.api.put(class("git", configuration("config", "a", "{{ repeat 1048577 \"x\" }}"))) }, codes.FailedPrecondition,
			[]string{`file "a"`, "1024 KiB"}},
		"too large together": {func(n *node) {
			n.api.put(class("git", configuration("config", "a", `{{ repeat 1048000 "x" }}`, "b", `{{ repeat 577 "x" }}`)))
		},
			codes.FailedPrecondition, []string{`file "b"`, "1024 KiB"}},
		"template is no string": {func(n *node) { n.api.put(class("git", object{"name": "config", "data": object{"a": 1}})) }, codes.FailedPrecondition,
			[]string{`file "a"`, "not a string"}},
		"token request forbidden": {func(n *node) {
			n.api.set(func() { n.api.noTokens = true })
			n.api.put(connector("default", "git", "git", with("http://c-git.default.svc.cluster.local", "status", "proxy", "httpAddress", "audience")))
		}, codes.PermissionDenied, []string{"may not request a token for ServiceAccount default/default", "ClusterRole connectors-csi-token", "token.expiration"}},
		"Pod gone": {func(n *node) {
			n.api.set(func() { clear(n.api.podUIDs) })
			n.api.put(connector("default", "git", "git", with("http://c-git.default.svc.cluster.local", "status", "proxy", "httpAddress", "audience")))
		}, codes.Aborted, []string{"does not match the UID in record"}},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			v := n.volume()
			c.prepare(n)
			v.mustRefuse(c.code, c.words...)
		})
	}
}

func TestManyFiles(t *testing.T) {
	n := startNode(t)
	var data []string
	for i := range 256 {
		data = append(data, fmt.Sprintf("%s-%d", strings.Repeat("long-name", 12), i), "x")
	}
	n.api.put(class("git", configuration("config", data...)))
	v := n.volume()
	v.mustPublish()
	if got := len(v.read()); got != 256 {
		t.Errorf("%d files", got)
	}
	v.mustUnpublish()
	n.api.put(class("git", configuration("config", append(data, "one-more", "x")...)))
	n.volume().mustRefuse(codes.FailedPrecondition, "in 256 files")
}

// The largest volume fits into its tmpfs, and so does its update by another one as large.
func TestLargestVolume(t *testing.T) {
	n := startPolling(t)
	large := func(letter string) object {
		var data []string
		for i := range 256 {
			data = append(data, fmt.Sprintf("%s-%d", strings.Repeat(letter, 100), i), strings.Repeat(letter, 4096))
		}
		return class("git", configuration("config", data...))
	}
	n.api.put(large("a"))
	v := n.volume()
	v.mustPublish()
	n.api.put(large("b"))
	n.age()
	v.mustPublish()
	v.wantClean()
	v.want(strings.Repeat("b", 100)+"-7", strings.Repeat("b", 4096))
}

func TestAPIServerErrors(t *testing.T) {
	for what, c := range sorted(map[string]struct {
		code   int
		body   string
		header []string
		want   codes.Code
		words  string
	}{
		"401":              {401, statusBody(401, "Unauthorized", "Unauthorized"), nil, codes.Unauthenticated, "Unauthorized (HTTP 401"},
		"403":              {403, statusBody(403, "Forbidden", "not for you"), nil, codes.PermissionDenied, "not for you"},
		"404":              {404, statusBody(404, "NotFound", "nobody knows it"), nil, codes.NotFound, "nobody knows it"},
		"409":              {409, statusBody(409, "Conflict", "another change"), nil, codes.Aborted, "another change"},
		"429":              {429, statusBody(429, "TooManyRequests", "slow down"), nil, codes.ResourceExhausted, "slow down"},
		"429 for an hour":  {429, statusBody(429, "TooManyRequests", "slow down"), []string{"Retry-After", "3600"}, codes.ResourceExhausted, "slow down"},
		"500":              {500, statusBody(500, "InternalError", "etcd is gone"), nil, codes.Unavailable, "etcd is gone"},
		"503":              {503, "", nil, codes.Unavailable, "Service Unavailable (HTTP 503"},
		"502 of a proxy":   {502, "<html>" + fileMark + "</html>", nil, codes.Unavailable, "Bad Gateway (HTTP 502"},
		"error, no Status": {400, `{"message":"` + fileMark + `"}`, nil, codes.InvalidArgument, "Bad Request"},
		"garbage":          {200, "<html>" + fileMark + "</html>", nil, codes.Unavailable, "not a Kubernetes object"},
		"list":             {200, `["` + fileMark + `"]`, nil, codes.Unavailable, "not a Kubernetes object"},
		"half an object":   {200, `{"metadata":{`, nil, codes.Unavailable, "not a Kubernetes object"},
		"nothing":          {200, "", nil, codes.Unavailable, "not a Kubernetes object"},
		"null":             {200, "null", nil, codes.Unavailable, "not a Kubernetes object"},
		"too much":         {200, `{"a":"` + strings.Repeat("x", 3<<20) + `"}`, nil, codes.FailedPrecondition, "more than 3072 KiB"},
		"no class in it":   {200, "{}", nil, codes.FailedPrecondition, "spec.connectorClassName"},
		"long message":     {500, statusBody(500, "InternalError", "%s", strings.Repeat("ü", 2000)), nil, codes.Unavailable, "…"},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			n.api.answer("/connectors/", c.code, c.body, c.header...)
			v := n.volume()
			v.mustRefuse(c.want, `onnector "default/git"`, c.words)
			if err := v.publish(); len(status.Convert(err).Message()) > 1020 || !utf8.ValidString(err.Error()) {
				t.Errorf("an event cannot hold %d bytes: %v", len(err.Error()), err)
			}
			n.api.answer("", 0, "")
			v.mustPublish()
		})
	}
}

func TestAPIServerErrorsForClassAndToken(t *testing.T) {
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	n.api.answer("/connectorclasses/", 500, statusBody(500, "InternalError", "etcd is gone"))
	v.mustRefuse(codes.Unavailable, `ConnectorClass "git" of Connector "default/git" cannot be read`, "etcd is gone")
	if n.api.count(tokenPath("default", "default")) > 0 {
		t.Error("a token was asked for before the objects were read")
	}
	n.api.answer("/token", 500, statusBody(500, "InternalError", "no key"))
	v.mustRefuse(codes.Unavailable, "no token of 1h0m0s for ServiceAccount default/default", "no key")
	n.api.answer("/token", 201, `{"status":{}}`)
	v.mustRefuse(codes.Unavailable, "the answer to the TokenRequest has no token")
	n.api.answer("/token", 201, `{"status":{"token":"`+strings.Repeat("x", 17<<10)+`"}}`)
	v.mustRefuse(codes.Unavailable, "the answer to the TokenRequest has no token")
	n.api.answer("", 0, "")
	v.mustPublish()
}

func TestRetryAfterIsHonoured(t *testing.T) {
	for _, seconds := range []string{"0", "1"} { // the least is a second
		n := startNode(t)
		var first time.Time
		n.api.set(func() {
			n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !first.IsZero() {
					return false
				}
				first = time.Now()
				w.Header().Set("Retry-After", seconds)
				w.WriteHeader(http.StatusTooManyRequests)
				return true
			}
		})
		n.volume().mustPublish()
		if waited := time.Since(first); waited < time.Second {
			t.Errorf("Retry-After: %s: it came again after %v", seconds, waited)
		}
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	n, thief := startNode(t), newAPIServer(t)
	n.api.answer("/connectors/", http.StatusFound, "", "Location", thief.URL+"/x")
	n.volume().mustRefuse(codes.Unavailable, "HTTP 302")
	if thief.count("") > 0 {
		t.Error("the token went to another server")
	}
}

func TestAPIServerDown(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	n.api.Close()
	v.mustRefuse(codes.Unavailable, `Connector "default/git" cannot be read`, "no answer from the API server", "connection refused")
}

func TestAPIServerSlow(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	gate := n.api.hold("/connectors/")
	wantError(t, v.publishWithin(100*time.Millisecond), codes.DeadlineExceeded)
	v.wantNothing()
	gate.open()
	eventually(t, "the call that was given up leaves the target", func() bool { return v.publish() == nil })
	v.mustPublish()
}

func TestAnotherServersCertificate(t *testing.T) {
	n := newNode(t)
	ca := filepath.Join(serviceAccountDir, "ca.crt")
	right, err := os.ReadFile(ca)
	must(t, err)
	defer os.WriteFile(ca, right, 0o644)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	authority := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, key.Public(), key)
	must(t, err)
	must(t, os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644))
	n.start()
	n.volume().mustRefuse(codes.Unavailable, "no answer from the API server", "certificate signed by unknown authority")
	if n.api.count("") > 0 {
		t.Error("a token went to it")
	}
}

// ---- Several Connectors, parameters, exclusions, built-in files ----

func TestSeveralConnectors(t *testing.T) {
	n := startNode(t)
	see := "{{ .connector.name }}:{{ range .connectors }} {{ .namespace }}/{{ .name }}={{ .spec.address }}{{ end }} {{ .connectorclass.proxyAddress | default \"none\" }}"
	a, b := class("a", configuration("both", "both", "a: "+see, "a", see), configuration("only-a", "x", "from a")), class("b", configuration("both", "both", "b: "+see, "b", see))
	with("http://proxy-of-b", "status", "proxy", "httpAddress", "url")(b)
	n.api.put(a, b, connector("default", "a1", "a"), connector("team-a", "a2", "a"), connector("team-a", "b1", "b"))

	v := n.volume(attrs{"connector.name": "-", "connectors": "a1, team-a/b1 ,team-a/a2", "configuration.names": "both,only-a"})
	v.mustPublish()
	v.wantFiles("a", "b", "both", "x")
	ofA := "a1: default/a1=https://a1.example.com team-a/a2=https://a2.example.com none"
	ofB := "b1: team-a/b1=https://b1.example.com http://proxy-of-b"
	v.want("a", ofA)
	v.want("b", ofB)
	v.want("both", "b: "+ofB) // class b is named later
	v = n.volume(attrs{"connector.name": "-", "connectors": "team-a/b1,a1,team-a/a2", "configuration.names": "both"})
	v.mustPublish()
	v.want("both", "a: "+ofA)

	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": "both,none"}).
		mustRefuse(codes.InvalidArgument, `"none"`, `ConnectorClass "a" has: both, only-a; ConnectorClass "b" has: both`)
	n.api.forbid("default/default", connectorPath("team-a", "b1"))
	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": "both"}).
		mustRefuse(codes.PermissionDenied, `may not read Connector "team-a/b1"`, "--namespace=team-a", "--serviceaccount=default:default")
	n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/none", "configuration.names": "both"}).mustRefuse(codes.NotFound, `"team-a/none"`)
}

func TestConfigurationParams(t *testing.T) {
	n := startNode(t)
	declared := configuration("config", "file", `{{ range $k, $v := .configurations }}{{ $k }}={{ $v }};{{ end }}`)
	declared["params"] = []any{
		param("kind", "enum", []any{"mirror", "publish"}, "default", "mirror"),
		param("list", "type", "array", "enum", []any{"a", "b", 3}, "default", []any{"a"}),
		param("map", "type", "object", "default", object{}),
		param("name"),
		param("empty", "default", ""),
	}
	n.api.put(class("git", declared, configuration("other", "other", `{{ .configurations.name | default "none" }}`)))
	defaults := "empty=;kind=mirror;list=[a];map=map[];name=n;"
	for params, want := range sorted(map[string]string{
		`{"config":{"name":"n"}}`:                                 defaults,
		`{"config":{"name":"n","kind":"publish","empty":"e"}}`:    "empty=e;kind=publish;list=[a];map=map[];name=n;",
		`{"config":{"name":"n","list":["b",3]}}`:                  "empty=;kind=mirror;list=[b 3];map=map[];name=n;",
		`{"config":{"name":"n","map":{"x":1}}}`:                   "empty=;kind=mirror;list=[a];map=map[x:1];name=n;",
		`{"config":{"name":"n","undeclared":{"x":[true]}}}`:       defaults + "undeclared=map[x:[true]];",
		`{"config":{"name":"n"},"other":{"name":"of the other"}}`: defaults,
		` {"config" : {"name":"n", "kind": null} } `:              defaults,
	}) {
		v := n.volume(attrs{"configuration.params": params, "configuration.names": "config,other"})
		v.mustPublish()
		v.want("file", want)
		if strings.Contains(params, "of the other") {
			v.want("other", "of the other")
		}
	}
	for params, word := range sorted(map[string]string{
		"":                                         `required configuration param "name" is missing`,
		`{"config":{}}`:                            `required configuration param "name" is missing`,
		`{"config":{"name":null}}`:                 `required configuration param "name" is missing`,
		`{"config":{"name":1}}`:                    `configuration param "name" must be of type string, not number`,
		`{"config":{"name":true}}`:                 `configuration param "name" must be of type string, not boolean`,
		`{"config":{"name":"n","kind":"none"}}`:    `configuration param "kind" must be one of [mirror publish], not "none"`,
		`{"config":{"name":"n","list":"a"}}`:       `configuration param "list" must be of type array, not string`,
		`{"config":{"name":"n","list":["a","c"]}}`: `configuration param "list" must be one of [a b 3], not "c"`,
		`{"config":{"name":"n","map":[]}}`:         `configuration param "map" must be of type object, not array`,
		`{"config":{"name":"n","kind":"` + strings.Repeat("x", 300) + `"}}`: `must be one of [mirror publish], not "` + strings.Repeat("x", 200) + ` …"`,
		`{"git":{}}`: "not in configuration.names: config",
	}) {
		n.volume(attrs{"configuration.params": params}).mustRefuse(codes.InvalidArgument, word)
	}
}

func TestExclusions(t *testing.T) {
	n := startNode(t)
	v := n.volume(attrs{"configuration.names": "first, ! one ,second"})
	v.mustPublish()
	v.wantFiles("shared", "two")
	v.attributes["configuration.names"] = "first,second,!two,!shared,!one"
	v.mustPublish()
	v.wantFiles()
	n.volume(attrs{"configuration.names": "first,!two"}).mustRefuse(codes.InvalidArgument, `excludes the file "two"`, "one, shared")
	n.volume(attrs{"configuration.names": "none,!one"}).mustRefuse(codes.InvalidArgument, `configuration "none"`)
}

func builtInFiles(d *driver) { d.builtInFiles = true }

func TestBuiltInFilesOfOneConnector(t *testing.T) {
	n := startNode(t, builtInFiles)
	n.api.put(connector("default", "git", "git", with(certificate("the CA"), "status", "proxy", "httpAddress", "CACerts")))
	v := n.volume(attrs{"configuration.names": "-"})
	v.mustPublish()
	v.wantFiles(".curlrc", ".env", "ca.cert", "ca.crt", "connector.status.proxyAddress", "context.proxy.caCert", "context.token", "http.proxy", "https.proxy")
	proxy := "http://default%2Fgit:" + v.pod.token + "@c-git.default.svc.cluster.local:80"
	for name, want := range sorted(map[string]string{
		"context.token": v.pod.token, "connector.status.proxyAddress": "http://c-git.default.svc.cluster.local",
		"http.proxy": proxy, "https.proxy": proxy, ".curlrc": "proxy = " + proxy + "\n",
		"ca.crt": certificate("the CA"), "ca.cert": certificate("the CA"), "context.proxy.caCert": certificate("the CA"),
	}) {
		v.want(name, want)
	}
	v.wantEnvironment(proxy)
	v.attributes["configuration.names"] = "!context.token,config" // a class's file beside them, one left out
	v.mustPublish()
	if files := v.read(); len(files) != 8+3 || files["context.token"] != "" || files["token"] != v.pod.token {
		t.Errorf("files %v", slices.Sorted(maps.Keys(files)))
	}
	n.api.put(class("git", configuration("config", "ca.crt", "the class's own")))
	v = n.volume()
	v.mustPublish()
	v.want("ca.crt", "the class's own")
	v.want("ca.cert", certificate("the CA"))
}

// wantEnvironment sources the file .env as people do, and looks at the environment of a process.
func (v *podVolume) wantEnvironment(proxy string) {
	v.t.Helper()
	cmd := exec.Command("sh", "-c", "set -eau; . ./.env; exec env")
	cmd.Dir = v.target
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	must(v.t, err)
	environment := strings.Split(string(out), "\n")
	for _, want := range []string{"http_proxy=" + proxy, "HTTP_PROXY=" + proxy, "https_proxy=" + proxy, "HTTPS_PROXY=" + proxy,
		"no_proxy=localhost,127.0.0.1", "NO_PROXY=localhost,127.0.0.1"} {
		if !slices.Contains(environment, want) {
			v.t.Errorf("no %s in %q", want, environment)
		}
	}
}

func TestBuiltInFilesOfSeveralConnectors(t *testing.T) {
	n := startNode(t, builtInFiles)
	a, b := class("a"), class("b")
	with("http://proxy-a", "status", "proxy", "httpAddress", "url")(a)
	with("https://proxy-b:8443/ignored", "status", "proxy", "httpAddress", "url")(b)
	with(certificate("CA of b"), "status", "proxy", "httpAddress", "CACerts")(b)
	n.api.put(a, b, connector("default", "a1", "a"), connector("team-a", "b1", "b"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "a1,team-a/b1", "configuration.names": ""})
	v.mustPublish()
	proxy := "https://default%2Fa1,team-a%2Fb1:" + v.pod.token + "@proxy-b:8443"
	v.want("http.proxy", proxy)
	v.want("connector.status.proxyAddress", "https://proxy-b:8443/ignored")
	v.want("ca.crt", certificate("CA of b"))
	v.wantEnvironment(proxy)
	if u, err := url.Parse(v.file("https.proxy")); err != nil || u.User.Username() != "default/a1,team-a/b1" {
		t.Error(u, err)
	}
}

func TestBuiltInFilesWithoutValues(t *testing.T) {
	n := startNode(t, builtInFiles)
	n.api.put(connector("default", "git", "git", with(nil, "status")))
	v := n.volume(attrs{"configuration.names": "-"})
	v.mustPublish()
	v.wantFiles("context.token")
	for address, want := range sorted(map[string]string{
		"http://[fd00::1]:3128": "@[fd00::1]:3128", "https://proxy": "@proxy:443", "http://10.0.0.1/path?x": "@10.0.0.1:80", "http://proxy:": "@proxy:80",
	}) {
		n.api.put(connector("default", "git", "git", with(address, "status", "proxy", "httpAddress", "url")))
		v := n.volume(attrs{"configuration.names": "-"})
		v.mustPublish()
		if got := v.file("http.proxy"); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %s", address, got)
		}
	}
	for _, address := range []string{"proxy:80", "ftp://proxy", "http://", "http:///path", "http://a$(id)", "http://a;id", "http://%41", "//proxy"} {
		n.api.put(connector("default", "git", "git", with(address, "status", "proxy", "httpAddress", "url")))
		n.volume(attrs{"configuration.names": "-"}).mustRefuse(codes.FailedPrecondition, "is not an http or https URL")
	}
}

func TestCA(t *testing.T) {
	n := startNode(t)
	ofConnector, ofClass := with(certificate("CA of the Connector"), "status", "proxy", "httpAddress", "CACerts"), with(certificate("CA of the class"), "status", "proxy", "httpAddress", "CACerts")
	plain, withCA := class("git", configuration("config", "ca", "{{ .context.proxy.caCert }}")), class("git", configuration("config", "ca", "{{ .context.proxy.caCert }}"))
	ofClass(withCA)
	for _, c := range []struct {
		class, connector object
		want             string
	}{
		{plain, connector("default", "git", "git"), ""},
		{plain, connector("default", "git", "git", ofConnector), certificate("CA of the Connector")},
		{withCA, connector("default", "git", "git"), certificate("CA of the class")},
		{withCA, connector("default", "git", "git", ofConnector), certificate("CA of the Connector")},
	} {
		n.api.put(c.class, c.connector)
		v := n.volume()
		v.mustPublish()
		v.want("ca", c.want)
	}
	n.api.put(connector("default", "last", "git", with(certificate("CA of the last"), "status", "proxy", "httpAddress", "CACerts")), connector("default", "none", "git"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "git,last,none"})
	v.mustPublish()
	v.want("ca", certificate("CA of the last"))
}

// Classes print addresses as they are; whoever writes a Connector shall not add lines to other people's configuration.
func TestInjection(t *testing.T) {
	n := startNode(t)
	address := func(value string) func(object) { return with(value, "spec", "address") }
	extension := func(value string) func(object) {
		return with([]any{object{"name": "a", "value": 1}, object{"name": "b", "value": value}}, "spec", "addressExtensions")
	}
	url := func(value string) func(object) { return with(value, "status", "proxy", "httpAddress", "url") }
	proxyAddress := func(value string) func(object) { return with(value, "status", "proxyAddress") }
	for _, field := range []struct {
		name string
		of   func(value string) func(object)
	}{{"spec.address", address}, {"spec.addressExtensions", extension}, {"status.proxy.httpAddress.url", url}, {"status.proxyAddress", proxyAddress}} {
		for _, value := range []string{"https://x\n[core]\n\tfsmonitor = id", "https://x\r", "https://x y", "\thttps://x", `https://x"`, "https://x'", `https://x\y`, "https://x`id`",
			"https://x\x00", "https://x\u0085", "https://x\u2028y", "https://x\u00a0", "https://x\x1b[31m"} {
			n.api.put(connector("default", "git", "git", field.of(value)))
			n.volume(attrs{"configuration.names": "first"}).mustRefuse(codes.FailedPrecondition, `Connector "default/git": `+field.name, "not allowed in an address")
		}
		n.api.put(connector("default", "git", "git", field.of("https://user@[fd00::1]:8443/päth;x/?a=b&c=%20#d,~!*()$")))
		n.volume(attrs{"configuration.names": "first"}).mustPublish()
	}
	for _, path := range [][]string{{"status", "proxyAddress"}, {"status", "proxy", "httpAddress", "url"}} {
		git := gitClass()
		with("https://x\n", path...)(git)
		n.api.put(git, connector("default", "git", "git"))
		n.volume().mustRefuse(codes.FailedPrecondition, `ConnectorClass "git": `+strings.Join(path, "."))
	}
}

// A bundle of certificates may have lines between them that say what they are, or something else.
func TestOnlyCertificatesOfABundleReachFiles(t *testing.T) {
	n := startNode(t)
	n.api.put(class("git", configuration("config", "ca", "{{ .context.proxy.caCert }}{{ .connector.status.proxy.httpAddress.CACerts }}")))
	one, two := certificate("one"), certificate("two")
	key := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("key")}))
	withHeader := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Headers: map[string]string{"X": "evil"}, Bytes: []byte("two")}))
	for _, c := range []struct{ bundle, want string }{
		{one + two, one + two},
		{"# evil\n" + one + "[core]\n\tfsmonitor = id\n" + two + "evil", one + two},
		{key + one, one},
		{one + withHeader, one + two},
		{strings.ReplaceAll(one, "\n", "\r\n"), one},
	} {
		n.api.put(connector("default", "git", "git", with(c.bundle, "status", "proxy", "httpAddress", "CACerts")))
		v := n.volume()
		v.mustPublish()
		v.want("ca", c.want+c.want)
	}
	for _, bundle := range []string{"evil", key, "-----BEGIN CERTIFICATE-----\nevil", strings.ReplaceAll(one, "-----END", "-----BACK")} {
		n.api.put(connector("default", "git", "git", with(bundle, "status", "proxy", "httpAddress", "CACerts")))
		n.volume().mustRefuse(codes.FailedPrecondition, `Connector "default/git": status.proxy.httpAddress.CACerts holds no certificate`)
	}
}

func TestProxyAddress(t *testing.T) {
	n := startNode(t)
	n.api.put(class("git", configuration("config", "file", "{{ .connector.status.proxyAddress }} {{ .connector.status.proxy.httpAddress.url }}")),
		connector("default", "git", "git", with("http://as-it-is", "status", "proxyAddress")))
	v := n.volume()
	v.mustPublish()
	v.want("file", "http://as-it-is http://c-git.default.svc.cluster.local")
}

// ---- Refresh and tokens ----

func TestUnchangedRepublishAsksNobody(t *testing.T) {
	n := startPolling(t)
	v := n.volume()
	v.settle()
	asked, generation := n.api.count(""), v.generation()
	for range 5 {
		v.mustPublish()
	}
	if n.api.count("") != asked {
		t.Errorf("%d requests within the refresh interval", n.api.count("")-asked)
	}
	n.age()
	v.mustPublish()
	if got := n.api.count("") - asked; got != 2 {
		t.Errorf("%d requests after it, for a Connector and a class", got)
	}
	if v.generation() != generation {
		t.Error("it has written what was there already")
	}
}

// The volumes of a node share what is read: once for each Connector and ServiceAccount, once for each class.
func TestReadsAreShared(t *testing.T) {
	n := startPolling(t)
	n.api.put(connector("default", "other", "git"))
	var volumes []*podVolume
	for range 10 {
		volumes = append(volumes, n.volume(), n.volume(attrs{"connector.name": "other"}))
	}
	volumes = append(volumes, n.pod("default/builder").volume("config"))
	for _, v := range volumes {
		v.mustPublish()
	}
	git, other, gitClass := connectorPath("default", "git"), connectorPath("default", "other"), classPath("git")
	before := map[string]int{git: n.api.count(git), other: n.api.count(other), gitClass: n.api.count(gitClass)}

	n.age()
	gate := n.api.hold("/connectors/")
	results := publishAtOnce(volumes)
	n.awaitCalls(len(volumes))
	eventually(t, "each Connector is asked for, by each ServiceAccount", func() bool { return gate.waiting.Load() == 3 })
	gate.open()
	for range volumes {
		must(t, <-results)
	}
	for path, want := range sorted(map[string]int{git: 2, other: 1, gitClass: 1}) {
		if got := n.api.count(path) - before[path]; got != want {
			t.Errorf("%d requests for %s, not %d", got, path, want)
		}
	}
}

// A read that fails fails for all who wait for it; those who came while it was under way share the next one.
func TestReadsThatFailAreShared(t *testing.T) {
	n := startPolling(t)
	var volumes []*podVolume
	for range 10 {
		volumes = append(volumes, n.volume())
		volumes[len(volumes)-1].settle()
	}
	path := connectorPath("default", "git")
	n.api.remove(path)
	n.age()
	before, gate := n.api.count(path), n.api.hold("/connectors/")
	results := publishAtOnce(volumes)
	n.awaitCalls(len(volumes))
	eventually(t, "one asks", func() bool { return gate.waiting.Load() == 1 })
	gate.open()
	for range volumes {
		wantError(t, <-results, codes.NotFound, `Connector "default/git" not found`)
	}
	if got := n.api.count(path) - before; got > 2 {
		t.Errorf("%d requests", got)
	}
	n.api.put(connector("default", "git", "git"))
	for _, v := range volumes {
		v.want("token", v.pod.token)
		v.mustPublish()
	}
}

// padded makes a Connector larger by so many bytes.
func padded(bytes int) func(object) { return with(strings.Repeat("x", bytes), "spec", "padding") }

func TestObjectsOfAVolumeAreLimited(t *testing.T) {
	n := startPolling(t)
	large := class("git", configuration("config", "token", "x", "padding", "{{/*"+strings.Repeat("x", 100<<10)+"*/}}"))
	n.api.put(large)
	var names []string
	for i := range 5 {
		name := fmt.Sprintf("large-%d", i)
		n.api.put(connector("default", name, "git", padded(1<<20-20_000)))
		names = append(names, name)
	}
	paths := []string{classPath("git")}
	for _, name := range names[:4] {
		paths = append(paths, connectorPath("default", name))
	}
	v := n.volume(attrs{"connector.name": "-", "connectors": strings.Join(names[:4], ",")})
	v.mustRefuse(codes.FailedPrecondition, `Connector "default/large-3"`, "more than 4096 KiB together") // the class counts once
	size := func(padding int) (all int) {                                                                // of the four and their class
		n.api.put(connector("default", "large-3", "git", padded(padding)))
		n.api.set(func() {
			for _, path := range paths {
				all += len(n.api.objects[path])
			}
		})
		return all
	}
	room := 1<<20 - 60_000
	for all := size(room); all != maxVolumeObjectsBytes; all = size(room) { // a resourceVersion may get a digit more
		room += maxVolumeObjectsBytes - all
	}
	if all := size(room + 1); all != maxVolumeObjectsBytes+1 {
		t.Fatalf("they have %d bytes", all)
	}
	v.mustRefuse(codes.FailedPrecondition, "more than 4096 KiB together")
	size(room)
	v.mustPublish()
	n.api.put(connector("default", "large-3", "git", padded(1<<20), with("https://moved", "spec", "address")))
	n.age()
	v.mustPublish() // once it is mounted, a volume goes on
	v.want("token", "x")
	n.volume(attrs{"connector.name": "-", "connectors": strings.Join(names, ",")}).mustRefuse(codes.FailedPrecondition,
		`Connector "default/large-3"`, "it has 1024 KiB", "more than 4096 KiB together")
	n.api.put(connector("default", "larger", "git", padded(3<<20)))
	n.volume(attrs{"connector.name": "larger"}).mustRefuse(codes.FailedPrecondition, `Connector "default/larger"`, "more than 3072 KiB")
}

// What the calls under way hold is bounded for each namespace and for all; what is beyond has to come again.
func TestObjectsUnderWayAreLimited(t *testing.T) {
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"))
	k := n.driver.kube
	hold := func(namespace string, mebibytes ...int) (calls []*call) {
		for _, size := range mebibytes {
			c := k.begin(podIdentity{namespace: namespace}, "", false)
			must(t, c.hold(&apiObject{raw: make([]byte, size<<20)}))
			calls = append(calls, c)
		}
		return calls
	}
	shared := &apiObject{raw: make([]byte, 3<<20)} // counts once
	for range 10 {
		c := k.begin(podIdentity{namespace: "default"}, "", false)
		must(t, c.hold(shared))
		defer c.end()
	}
	full := hold("default", 3)
	n.volume().mustRefuse(codes.ResourceExhausted, `Connector "default/git" cannot be read`, "6144 KiB", `namespace "default"`)
	n.pod("team-a/default").volume("config").mustPublish()
	rest := append(hold("team-b", 3, 3), hold("team-c", 3, 1)...)
	n.pod("team-a/default").volume("config").mustRefuse(codes.ResourceExhausted, "16384 KiB")
	for _, c := range rest {
		c.end()
	}
	n.pod("team-a/default").volume("config").mustPublish()
	for _, c := range full {
		c.end()
	}
	n.volume().mustPublish()
	if k.held.bytes != 3<<20 || len(k.namespaces) != 1 {
		t.Errorf("%d bytes are held, by %v", k.held.bytes, k.namespaces)
	}
}

// The cache has each object once, whoever reads it, keeps to its limit by what was used longest ago, and has nothing
// of reads that failed.
func TestCache(t *testing.T) {
	n := startPolling(t)
	k, volumes := n.driver.kube, []*podVolume{}
	for i := range 3 {
		n.pod(fmt.Sprintf("default/reader-%d", i)).volume("config").mustPublish()
	}
	if git := k.cache[connectorPath("default", "git")]; len(k.cache) != 2 || len(git.readers) != 3 {
		t.Errorf("the cache has %d objects; one has the readers %v", len(k.cache), git.readers)
	}
	for i := range 10 {
		name := fmt.Sprintf("large-%d", i)
		n.api.put(connector("default", name, "git", padded(1<<20)))
		volumes = append(volumes, n.volume(attrs{"connector.name": name}))
		volumes[i].settle()
		volumes[0].mustPublish() // so that it is not the one used longest ago
	}
	size := 0
	for _, c := range k.cache {
		size += len(c.object.raw)
	}
	if k.cacheBytes != size || size > 4<<20 || size < 3<<20 {
		t.Errorf("the cache has %d bytes and counts %d", size, k.cacheBytes)
	}
	has := func(name string) bool { return k.cache[connectorPath("default", name)] != nil }
	if !has("large-0") || has("large-1") || !has("large-9") {
		t.Errorf("it has %v", slices.Sorted(maps.Keys(k.cache)))
	}
	volumes[1].mustPublish() // reads again

	objects := len(k.cache)
	for i := range 100 {
		n.volume(attrs{"connector.name": fmt.Sprintf("none-%d", i)}).mustRefuse(codes.NotFound)
	}
	if len(k.cache) != objects || len(k.reads) != 0 {
		t.Errorf("failed reads left %d objects and %d reads", len(k.cache)-objects, len(k.reads))
	}

	for _, v := range volumes {
		v.mustUnpublish()
	}
	n.age()
	n.age()
	for _, c := range k.cache {
		for reader, began := range c.readers {
			c.readers[reader] = began.Add(-2 * k.refresh)
		}
	}
	k.tidied = time.Time{}
	n.volume().mustPublish()
	if len(k.cache) != 2 {
		t.Errorf("long after, the cache has %v", slices.Sorted(maps.Keys(k.cache)))
	}
}

// Of two reads the one counts that began later, whichever ends first: no file goes back to an older content.
func TestSlowReadDoesNotRollBack(t *testing.T) {
	for _, fresh := range []bool{true, false} {
		t.Run(fmt.Sprintf("the slow one is fresh: %v", fresh), func(t *testing.T) {
			n := startPolling(t)
			path, held, open := connectorPath("default", "git"), make(chan bool), make(chan bool)
			slow, quick := n.volume(), n.volume()
			if !fresh {
				slow.settle()
				n.age()
			}
			first := true
			n.api.set(func() {
				n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
					if r.URL.Path != path {
						return false
					}
					n.api.mu.Lock()
					old, slow := n.api.objects[path], first
					first = false
					n.api.mu.Unlock()
					if slow {
						close(held)
						<-open
						w.Write(old)
					}
					return slow
				}
			})
			result := make(chan error)
			go func() { result <- slow.publish() }()
			<-held
			n.api.put(connector("default", "git", "git", with("https://new", "spec", "address")))
			quick.mustPublish()
			close(open)
			must(t, <-result)
			for range 2 {
				for _, v := range []*podVolume{slow, quick} {
					if !strings.Contains(v.file(".gitconfig"), "https://new") {
						t.Errorf("the file is %q", v.file(".gitconfig"))
					}
					v.mustPublish()
				}
			}
		})
	}
}

// Callers that give up do not spoil the read for the one that waits behind them.
func TestCallersThatGiveUp(t *testing.T) {
	n := startPolling(t)
	volumes := []*podVolume{n.volume(), n.volume(), n.volume()}
	for _, v := range volumes {
		v.settle()
	}
	n.age()
	gate := n.api.hold("/connectors/")
	results := []chan error{make(chan error), make(chan error), make(chan error)}
	for i, timeout := range []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, time.Minute} {
		go func() { results[i] <- volumes[i].publishWithin(timeout) }()
		eventually(t, "it is under way", func() bool {
			n.driver.mu.Lock()
			defer n.driver.mu.Unlock()
			return n.driver.busy[volumes[i].target] != nil
		})
	}
	wantError(t, <-results[0], codes.DeadlineExceeded)
	wantError(t, <-results[1], codes.DeadlineExceeded)
	eventually(t, "the third asks itself", func() bool { return gate.waiting.Load() == 1 })
	gate.open()
	must(t, <-results[2])
}

// Whether a Pod may read a Connector is the API server's decision on the Pod's own token, each time a volume is new.
func TestFirstPublishChecksThePodsOwnToken(t *testing.T) {
	n := startNode(t)
	git := connectorPath("default", "git")
	n.volume().mustPublish()
	if user := n.api.lastReader(git); user != "default/default" {
		t.Errorf("the Connector was read by %s", user)
	}
	if user := n.api.lastReader(classPath("git")); user != driverUser {
		t.Errorf("the class was read by %s", user)
	}

	forged := n.volume() // claims to be of a ServiceAccount whose Connector is in the cache
	parts := strings.Split(forged.pod.token, ".")
	forged.pod.token = parts[0] + "." + parts[1] + "." + sign("something else")
	forged.mustRefuse(codes.Unauthenticated, `Connector "default/git"`, "Unauthorized")

	expired := n.volume()
	expired.pod.token = issue("default", "default", map[string]string{"name": expired.pod.name, "uid": expired.pod.uid}, -time.Minute, apiAudience)
	expired.mustRefuse(codes.Unauthenticated)

	n.api.forbid("default/builder", git)
	n.pod("default/builder").volume("config").mustRefuse(codes.PermissionDenied, "ServiceAccount default/builder may not read")

	v := n.volume()
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	v.mustPublish() // and it sees the present, not the cache
	if !strings.Contains(v.file(".gitconfig"), "https://changed") {
		t.Error("a first publish was made from the cache")
	}

	// Not even what another Pod of the ServiceAccount was given since then counts.
	n.api.put(connector("default", "slow", "git"))
	gate, read := n.api.hold("/connectors/slow"), n.api.count(git)
	published := make(chan error)
	go func() { published <- n.volume(attrs{"connector.name": "-", "connectors": "slow,git"}).publish() }()
	eventually(t, "the first Connector is read", func() bool { return gate.waiting.Load() == 1 })
	n.volume().mustPublish()
	gate.open()
	must(t, <-published)
	if read = n.api.count(git) - read; read != 2 {
		t.Errorf("two first publishes read the Connector %d times", read)
	}
}

func TestPermissionTakenAway(t *testing.T) {
	n := startPolling(t)
	v := n.volume()
	v.mustPublish()
	n.api.forbid("default/default", connectorPath("default", "git"))
	v.mustPublish() // the same object, the same token: nothing to do
	n.age()
	wantError(t, v.publish(), codes.PermissionDenied, "may not read")
	v.want("token", v.pod.token)
}

func TestDriversTokenIsReadAsItRotates(t *testing.T) {
	n := startNode(t)
	n.volume().mustPublish()
	n.awaitWatches(2) // one of them comes with the driver's token too
	first := n.api.lastDriverToken()
	rotated := driverToken()
	must(t, os.WriteFile(filepath.Join(serviceAccountDir, "token"), []byte(rotated), 0o600))
	n.volume().mustPublish()
	if first == rotated || n.api.lastDriverToken() != rotated {
		t.Error("the driver uses its old token")
	}
}

func TestKubeletsNewTokenReachesTheFile(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	asked := n.api.count("")
	for range 3 {
		v.pod.renewToken()
		v.mustPublish()
		v.want("token", v.pod.token)
		v.wantClean()
	}
	if n.api.count("") != asked {
		t.Error("a new token made the driver ask the API server")
	}
}

func TestOwnTokenForAnotherExpiration(t *testing.T) {
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	path := tokenPath("default", "default")
	v.mustPublish()
	request := n.api.lastBody(path)
	for field, want := range sorted(map[string]any{"apiVersion": "v1", "kind": "Pod", "name": v.pod.name, "uid": v.pod.uid}) {
		if got := valueAt(request, "spec", "boundObjectRef", field); got != want {
			t.Errorf("boundObjectRef.%s is %v, not %v", field, got, want)
		}
	}
	if got := valueAt(request, "spec", "expirationSeconds"); got != 3600. {
		t.Errorf("expirationSeconds is %v", got)
	}
	if got := valueAt(request, "spec", "audiences"); got != nil {
		t.Errorf("audiences are %v, not the API server's default", got)
	}
	by, connectorBy := n.api.lastReader(path), n.api.lastReader(connectorPath("default", "git"))
	if by != driverUser || connectorBy != "default/default" {
		t.Errorf("requests came from %q and %q", by, connectorBy)
	}
	token := v.file("token")
	if c, ok := decodeClaims(token); !ok || token == v.pod.token || c.Kubernetes.Pod["uid"] != v.pod.uid || time.Until(time.Unix(c.Expires, 0)) < 59*time.Minute {
		t.Errorf("the token in the file has the claims %+v", c)
	}
	n.volume(attrs{"token.expiration": "10m"}).mustPublish() // the shortest
}

func TestOwnTokenIsRenewedAt80Percent(t *testing.T) {
	n := startPolling(t)
	path := tokenPath("default", "default")
	v := n.volume(attrs{"token.expiration": "1h"})
	v.mustPublish()
	token := v.file("token")
	n.age()
	v.pod.renewToken()
	v.mustPublish()
	if v.file("token") != token || n.api.count(path) != 1 {
		t.Error("a fresh token was renewed")
	}

	if at := time.Until(n.driver.tokens[v.target].renew); at < 47*time.Minute || at > 48*time.Minute {
		t.Errorf("a token of an hour is renewed after %v", at)
	}
	v.endToken() // 48 minutes later
	v.mustPublish()
	if v.file("token") == token || n.api.count(path) != 2 {
		t.Error("an old token was not renewed")
	}
	token = v.file("token")

	v.attributes["token.expiration"] = "2h" // the API server may give less than what was asked for
	n.api.set(func() { n.api.lifetime = time.Second })
	v.mustPublish()
	short := v.file("token")
	if short == token || n.api.count(path) != 3 {
		t.Error("another expiration did not lead to another token")
	}
	n.api.set(func() { n.api.lifetime = 0 })
	eventually(t, "the token is renewed", func() bool { v.mustPublish(); return v.file("token") != short })
	if n.api.count(path) != 4 {
		t.Errorf("%d tokens were asked for", n.api.count(path))
	}
	v.wantClean()
}

// endToken makes the volume's token, which the driver asked for, due for renewal.
func (v *podVolume) endToken() {
	d := v.node.driver
	d.mu.Lock()
	defer d.mu.Unlock()
	token := d.tokens[v.target]
	token.renew = time.Now()
	d.tokens[v.target] = token
}

// The clocks of the node and of the API server may differ as they like; the lifetime is what the answer grants.
func TestRenewalIsCountedFromTheRequest(t *testing.T) {
	n := startNode(t)
	for what, c := range sorted(map[string]struct{ clock, granted, renew time.Duration }{
		"25 minutes behind": {-25 * time.Minute, 0, 48 * time.Minute},
		"25 minutes ahead":  {25 * time.Minute, 0, 48 * time.Minute},
		"a day behind":      {-24 * time.Hour, 0, 48 * time.Minute},
		"years ahead":       {99999 * time.Hour, 0, 48 * time.Minute},
		"less is granted":   {-time.Hour, 20 * time.Minute, 16 * time.Minute},
		"more is granted":   {0, 300 * time.Hour, 48 * time.Minute},
		"negative":          {0, -time.Hour, 48 * time.Minute},
		"nothing is said":   {0, time.Nanosecond, 48 * time.Minute}, // as 0 seconds
	}) {
		v := n.volume(attrs{"token.expiration": "1h"})
		n.api.set(func() { n.api.clock, n.api.lifetime = c.clock, c.granted })
		v.mustPublish()
		asked := n.api.count(tokenPath("default", "default"))
		v.mustPublish()
		if at := time.Until(n.driver.tokens[v.target].renew); at > c.renew || at < c.renew-time.Minute || n.api.count(tokenPath("default", "default")) != asked {
			t.Errorf("%s: the token is renewed after %v, not %v", what, at, c.renew)
		}
	}
	v := n.volume(attrs{"token.expiration": "24h"})
	n.api.set(func() { n.api.clock, n.api.lifetime = 0, 0 })
	v.mustPublish()
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 86400. {
		t.Errorf("expirationSeconds is %v", got)
	}
}

// A volume that fails after its token was issued has it for its next try.
func TestTokenIsKeptForTheNextTry(t *testing.T) {
	n := startPolling(t)
	path := tokenPath("default", "default")
	n.api.put(class("git", configuration("config", "a", "{{ .none }}")))
	v := n.volume(attrs{"token.expiration": "1h"})
	for range 3 {
		v.mustRefuse(codes.FailedPrecondition, "has no value")
	}
	n.api.put(gitClass())
	must(t, os.WriteFile(v.target, nil, 0o600))
	for range 3 {
		wantError(t, v.publish(), codes.FailedPrecondition, "did not mount")
	}
	must(t, os.Remove(v.target))
	v.mustPublish()
	if n.api.count(path) != 1 || v.file("token") != n.driver.tokens[v.target].value {
		t.Errorf("%d tokens for one volume", n.api.count(path))
	}

	n.api.put(class("git", configuration("config", "a", "{{ .none }}")))
	n.age()
	v.endToken()
	for range 3 {
		wantError(t, v.publish(), codes.FailedPrecondition, "has no value")
	}
	v.attributes["token.expiration"] = "2h"
	wantError(t, v.publish(), codes.FailedPrecondition, "has no value")
	if n.api.count(path) != 3 {
		t.Errorf("%d tokens, not one more for the renewal and one for another lifetime", n.api.count(path)-1)
	}
	v.mustUnpublish()
	if len(n.driver.tokens) != 0 {
		t.Errorf("%d tokens are kept after the unpublish", len(n.driver.tokens))
	}
}

// Kubelet sends no unpublish for volumes that were never mounted.
func TestTokensOfVolumesThatAreNeverMounted(t *testing.T) {
	n := startNode(t)
	path := tokenPath("default", "default")
	hour := attrs{"token.expiration": "1h"}
	mounted := n.volume(hour)
	mounted.settle()
	n.api.put(class("bad", configuration("config", "a", "{{ .none }}")), connector("default", "bad", "bad"))
	var last *podVolume
	for range 600 {
		last = n.volume(hour, attrs{"connector.name": "bad"})
		wantError(t, last.publish(), codes.FailedPrecondition, "has no value")
		if got := len(n.driver.tokens); got > 257 {
			t.Fatalf("%d tokens are kept", got)
		}
	}
	asked := n.api.count(path)
	wantError(t, last.publish(), codes.FailedPrecondition, "has no value")
	mounted.mustPublish()
	if n.api.count(path) != asked {
		t.Error("the token of a mounted volume, or of the last one, is not kept")
	}
}

func TestRenewalThatFailsKeepsTheToken(t *testing.T) {
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	v.mustPublish()
	token := v.file("token")
	v.endToken()
	n.api.set(func() { n.api.noTokens = true })
	wantError(t, v.publish(), codes.PermissionDenied, "connectors-csi-token")
	v.want("token", token)
	n.api.set(func() { n.api.noTokens = false })
	v.mustPublish()
	if v.file("token") == token {
		t.Error("the token was not renewed")
	}
}

func TestAudience(t *testing.T) {
	n := startPolling(t)
	proxy := []string{"status", "proxy", "httpAddress", "audience"}
	git, other := gitClass(), class("other", configuration("config", "other", "x"))
	with("http://c-git", "spec", "proxy", "audience")(git)
	with("http://c-other", proxy...)(other)
	n.api.put(git, other, connector("default", "git", "git", with("http://c-git", proxy...)), connector("default", "same", "git", with("http://c-git", proxy...)),
		connector("default", "address", "git", with("http://c-address.default.svc.cluster.local", proxy...)), connector("default", "other", "other"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "git,same,address,other"})
	v.mustPublish()
	c, _ := decodeClaims(v.file("token"))
	if want := []string{apiAudience, "http://c-git", "http://c-address.default.svc.cluster.local", "http://c-other"}; !slices.Equal(c.Audience, want) {
		t.Errorf("audiences %v, not %v", c.Audience, want)
	}
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 1800. {
		t.Errorf("expirationSeconds is %v", got)
	}

	with("http://moved", "spec", "proxy", "audience")(git)
	n.api.put(git, connector("default", "git", "git", with("http://moved", proxy...)), connector("default", "same", "git"))
	n.age()
	v.mustPublish()
	if c, _ := decodeClaims(v.file("token")); !slices.Contains(c.Audience, "http://moved") || slices.Contains(c.Audience, "http://c-git") {
		t.Errorf("the audience has changed, but the token's are %v", c.Audience)
	}
}

// Whoever writes a Connector's status decides where tokens go. That must not be a way to have them made for another service.
func TestAudienceOfSomebodyElse(t *testing.T) {
	n := startNode(t)
	httpAddress := func(fields object) func(object) { return with(fields, "status", "proxy", "httpAddress") }
	for _, c := range []struct {
		what   string
		status func(object)
	}{
		{"another service", httpAddress(object{"url": "http://proxy", "audience": "vault"})},
		{"no proxy", httpAddress(object{"audience": "vault"})},
		{"a part of the proxy's address", httpAddress(object{"url": "http://proxy", "audience": "http://prox"})},
		{"the address in another spelling", httpAddress(object{"url": "http://proxy", "URL": "vault", "audience": "vault"})},
		{"an address that is not used", with(object{"proxyAddress": "http://evil", "proxy": object{"httpAddress": object{"url": "vault", "audience": "vault"}}}, "status")},
		{"an address in a list", with(object{"proxy": []any{object{"httpAddress": object{"url": "vault"}}, object{"httpAddress": object{"audience": "vault"}}}}, "status")},
	} {
		t.Run(c.what, func(t *testing.T) {
			n.api.put(connector("default", "git", "git", c.status))
			v := n.volume()
			v.t = t
			if c.what == "an address in a list" { // which is none, and no audience
				v.attributes["configuration.names"] = "first"
				v.mustPublish()
			} else {
				v.mustRefuse(codes.FailedPrecondition, `Connector "default/git": the audience "`, `ConnectorClass "git"`)
			}
			if got := n.api.count(tokenPath("default", "default")); got != 0 {
				t.Errorf("%d tokens were asked for", got)
			}
		})
	}
}

// ---- Watches and pushes ----

// A change of any object reaches the files of its volumes without a call of kubelet: of a Connector, of its status,
// and of its class.
func TestChangesArePushed(t *testing.T) {
	n := startNode(t)
	volumes := []*podVolume{n.volume(), n.volume(), n.pod("default/builder").volume("config")}
	for _, v := range volumes {
		v.settle()
	}
	n.api.awaitStreams(3) // two readers of the Connector, and the driver's of the class
	await := func(file, content string) {
		t.Helper()
		for _, v := range volumes {
			v.await(file, content)
			v.want("token", v.pod.token)
		}
	}
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	await(".gitconfig", "https://changed")
	n.api.put(connector("default", "git", "git", with("https://proxy", "status", "proxy", "httpAddress", "url")))
	await(".gitconfig", "https://proxy")
	n.api.put(class("git", configuration("config", "token", "{{ .context.token }}", "new", "of the class")))
	await("new", "of the class")
}

// There is one stream for each reader and object, whatever the number of volumes, and none when they are gone.
func TestStreamsAreShared(t *testing.T) {
	n := startNode(t)
	n.api.put(connector("default", "other", "git"))
	pod := n.pod()
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume(), n.volume(attrs{"connector.name": "other"}), n.pod("default/builder").volume("config")}
	for _, v := range volumes {
		v.settle()
	}
	n.api.awaitStreams(4)
	git := n.api.stream("default/default", connectorPath("default", "git"))
	n.api.stream("default/default", connectorPath("default", "other"))
	n.api.stream("default/builder", connectorPath("default", "git"))
	class := n.api.stream(driverUser, classPath("git"))
	for _, s := range []*apiStream{git, class} {
		if !s.metadataOnly || s.version != "" || s.seconds < 1500 || s.seconds > 1800 {
			t.Errorf("a watch is %+v", s.watchRequest)
		}
	}
	volumes[0].mustUnpublish()
	volumes[1].mustUnpublish()
	volumes[3].mustUnpublish()
	n.api.awaitStreams(3)
	volumes[4].mustUnpublish()
	n.api.awaitStreams(2)
	volumes[2].mustUnpublish()
	n.api.awaitStreams(0)
	eventually(t, "no stream counts", func() bool { return n.readMetrics()["connectors_csi_watches"] == 0 })
}

func TestNothingIsReadWhileNothingChanges(t *testing.T) {
	n := startNode(t, func(d *driver) { d.kube.refresh = time.Nanosecond }) // without a stream each call would read
	v := n.volume()
	v.settle()
	n.api.awaitStreams(2)
	// What was read before its stream was open is read once more.
	eventually(t, "a call asks nobody", func() bool {
		asked := n.api.count("")
		v.mustPublish()
		return n.api.count("") == asked
	})
	asked := n.api.count("")
	for range 20 {
		n.api.stream("default/default", connectorPath("default", "git")).bookmark()
		v.mustPublish()
		v.pod.renewToken()
		v.mustPublish()
		v.want("token", v.pod.token)
	}
	if got := n.api.count("") - asked; got != 0 {
		t.Errorf("%d requests", got)
	}
}

// moved makes a Connector with another address.
func moved(name, address string) object {
	return connector("default", name, "git", with("https://"+address, "spec", "address"))
}

// await waits until the text is in a file of the volume.
func (v *podVolume) await(name, text string) {
	v.t.Helper()
	eventually(v.t, fmt.Sprintf("%s of %s has %q", name, v.target, text), func() bool {
		content, _ := os.ReadFile(filepath.Join(v.target, name))
		return strings.Contains(string(content), text)
	})
}

// awaitMetric waits until the metric has at least the value.
func (n *node) awaitMetric(sample string, value float64) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%s is %v", sample, value), func() bool { return n.readMetrics()[sample] >= value })
}

// awaitWatches waits until so many streams are open on both sides, so that what is read no more is known.
func (n *node) awaitWatches(count int) {
	n.t.Helper()
	n.api.awaitStreams(count)
	eventually(n.t, fmt.Sprintf("the driver counts %d watches", count), func() bool {
		return n.readMetrics()["connectors_csi_watches"] == float64(count)
	})
}

// watchedVolume makes a volume that is settled and whose objects are watched, as the only one of its node.
func (n *node) watchedVolume(attributes ...attrs) *podVolume {
	n.t.Helper()
	v := n.volume(attributes...)
	v.settle()
	n.awaitWatches(2)
	return v
}

var (
	gitPath  = connectorPath("default", "git")
	pushedOK = `connectors_csi_pushes_total{code="OK"}`
	anHour   = "--refresh-interval=1h"
)

// wantForgotten makes sure that the driver keeps nothing of volumes, when all are gone: no stream, no entry, and no
// goroutine that it has started for one.
func (n *node) wantForgotten() {
	n.t.Helper()
	n.awaitWatches(0)
	d, k, left := n.driver, n.driver.kube, ""
	defer func() {
		if n.t.Failed() {
			n.t.Log("left of the volumes:", left)
		}
	}()
	eventually(n.t, "the driver has forgotten all volumes", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		stacks := make([]byte, 4<<20)
		stacks = stacks[:runtime.Stack(stacks, true)]
		for _, s := range strings.Split(string(stacks), "\n\n") {
			if strings.Contains(s, fmt.Sprintf("(*kube).follow(%p", k)) {
				left = s
				return false
			}
		}
		left = fmt.Sprint(d.busy, d.volumes, len(d.tokens), k.streams, k.reads, k.namespaces, k.held.bytes)
		return len(d.busy)+len(d.volumes)+len(d.tokens)+len(k.streams)+len(k.reads)+len(k.namespaces)+k.held.bytes == 0
	})
}

// Whatever comes over a stream, and however it ends: the file stays as it is, and the next change reaches it.
func TestWhateverAStreamSays(t *testing.T) {
	event := func(kind, name, uid string, version int) string {
		return fmt.Sprintf(`{"type":%q,"object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1",`+
			`"metadata":{"name":%q,"namespace":"default","uid":%q,"resourceVersion":"%d"}}}`, kind, name, uid, version) + "\n"
	}
	status := func(code int, reason string) string {
		return fmt.Sprintf(`{"type":"ERROR","object":%s}`, statusBody(code, reason, "no")) + "\n"
	}
	cases := map[string]struct {
		text string
		end  string // how the stream ends after it, if it does
	}{
		"end":                         {"", "end"},
		"abort":                       {"", "abort"},
		"half a line, then the end":   {`{"type":"MODIFIED","obj`, "end"},
		"half a line, then an abort":  {`{"type":"MODIFIED","obj`, "abort"},
		"a line without its newline":  {strings.TrimSpace(event("MODIFIED", "x", "y", 1)), "end"},
		"the end in a huge line":      {strings.Repeat("x", 1<<20), "end"},
		"a huge line":                 {event("MODIFIED", strings.Repeat("x", 1<<20), "y", 1), ""},
		"a huge line without end":     {strings.Repeat("x", 1<<20), ""},
		"a huge line of brackets":     {strings.Repeat("[", 1<<20) + "\n", ""},
		"not JSON":                    {"<html>\n", ""},
		"empty lines":                 {"\n\n\r\n", ""},
		"null":                        {"null\n", ""},
		"a list":                      {"[]\n", ""},
		"nothing":                     {"{}\n", ""},
		"no object":                   {`{"type":"MODIFIED"}` + "\n", ""},
		"an object without metadata":  {`{"type":"MODIFIED","object":{}}` + "\n", ""},
		"another type":                {event("RENAMED", "x", "y", 1), ""},
		"wrong types":                 {`{"type":7,"object":"x"}` + "\n", ""},
		"another object":              {event("MODIFIED", "another", "uid-1", 1<<40), ""},
		"an old version":              {event("MODIFIED", "git", "uid-1", 1), ""},
		"DELETED, which is not so":    {event("DELETED", "git", "uid-1", 1<<40), ""},
		"a bookmark":                  {event("BOOKMARK", "", "", 1), ""},
		"a bookmark and the end":      {event("BOOKMARK", "", "", 1), "end"},
		"a bookmark without version":  {`{"type":"BOOKMARK","object":{"metadata":{}}}` + "\n", "end"},
		"a version that is no number": {`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"a&b=c d"}}}` + "\n", "end"},
		"410":                         {status(410, "Expired"), ""},
		"410 and the end":             {status(410, "Expired"), "end"},
		"500":                         {status(500, "InternalError"), ""},
		"401":                         {status(401, "Unauthorized"), "end"},
		"an error without status":     {`{"type":"ERROR"}` + "\n", ""},
	}
	n := startNode(t)
	volumes, i := map[string]*podVolume{}, 0
	for what := range cases {
		i++
		name := fmt.Sprintf("case-%d", i)
		n.api.put(connector("default", name, "git"))
		volumes[what] = n.volume(attrs{"connector.name": name})
		volumes[what].settle()
	}
	n.awaitWatches(len(cases) + 1)
	generations := map[string]uint64{}
	for what, c := range cases {
		generations[what] = volumes[what].generation()
		s := n.api.stream("default/default", connectorPath("default", volumes[what].attributes["connector.name"]))
		s.send(c.text)
		if c.end != "" {
			s.close(c.end == "abort")
		}
	}
	for what, v := range volumes {
		v.mustPublish()
		if v.generation() != generations[what] {
			t.Errorf("%s: it has written what was there already", what)
		}
		n.api.put(moved(v.attributes["connector.name"], "changed"))
	}
	for what, v := range volumes {
		t.Run(what, func(t *testing.T) {
			v.t = t
			v.await(".gitconfig", "https://changed")
			v.mustUnpublish()
		})
	}
	n.wantForgotten()
}

// kubectl apply leaves the whole object in an annotation: an event can be larger than what is looked into, and says that
// something has changed all the same, on a stream that goes on.
func TestEventsWithLargeAnnotations(t *testing.T) {
	n := startNode(t)
	annotated := with(strings.Repeat("x", 100<<10), "metadata", "annotations", "kubectl.kubernetes.io/last-applied-configuration")
	put := func(i int) {
		n.api.put(connector("default", "git", "git", annotated, with(fmt.Sprintf("https://large-%d", i), "spec", "address")))
	}
	put(0)
	v := n.watchedVolume()
	for i := range 3 {
		put(i + 1)
		v.await(".gitconfig", fmt.Sprintf("https://large-%d", i+1))
	}
	if opened := n.readMetrics()[`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="200"}`]; opened != 1 {
		t.Errorf("the Connector's watch was opened %v times", opened)
	}
}

// Where the API server does not open streams, objects are polled, and it is not asked again and again.
func TestWatchesThatAreRefused(t *testing.T) {
	thief := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("somebody else has got %s %s", r.Method, r.URL)
	}))
	defer thief.Close()
	answer := func(code int, body string, header ...string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			for pair := range slices.Chunk(header, 2) {
				w.Header().Set(pair[0], pair[1])
			}
			w.WriteHeader(code)
			io.WriteString(w, body)
		}
	}
	never := make(chan struct{})
	defer close(never)
	wait := func(r *http.Request) {
		select {
		case <-never:
		case <-r.Context().Done():
		}
	}
	cases := map[string]func(http.ResponseWriter, *http.Request){
		"401":            answer(401, statusBody(401, "Unauthorized", "Unauthorized")),
		"403":            answer(403, statusBody(403, "Forbidden", "no")),
		"404":            answer(404, statusBody(404, "NotFound", "no")),
		"410":            answer(410, statusBody(410, "Expired", "no")),
		"429":            answer(429, statusBody(429, "TooManyRequests", "later"), "Retry-After", "3600"),
		"429 at once":    answer(429, statusBody(429, "TooManyRequests", "now"), "Retry-After", "0"),
		"500":            answer(500, "a proxy's page"),
		"503":            answer(503, ""),
		"redirect":       answer(307, "", "Location", thief.URL+"/x"),
		"HTML":           answer(200, "<html>\n<body>\n</html>\n", "Content-Type", "text/html"),
		"a list":         answer(200, `{"kind":"ConnectorList","items":[]}`),
		"nothing":        answer(200, ""),
		"no content":     answer(204, ""),
		"a huge failure": answer(400, strings.Repeat("x", 8<<20)),
		"dies":           func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
		"silence":        func(_ http.ResponseWriter, r *http.Request) { wait(r) },
		"opens, then says nothing": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(200)
			http.NewResponseController(w).Flush()
			wait(r)
		},
	}
	n := newNode(t)
	byName, i := map[string]func(http.ResponseWriter, *http.Request){}, 0
	n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		name, _ := strings.CutPrefix(r.URL.Query().Get("fieldSelector"), "metadata.name=")
		if byName[name] == nil {
			return false
		}
		byName[name](w, r)
		return true
	}
	names := map[string]string{}
	for what, answer := range cases {
		i++
		names[what] = fmt.Sprintf("case-%d", i)
		byName[names[what]] = answer
	}
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	began, volumes := time.Now(), map[string]*podVolume{}
	for what, name := range names {
		n.api.put(connector("default", name, "git"))
		volumes[what] = n.volume(attrs{"connector.name": name})
		volumes[what].settle()
	}
	for what, name := range names {
		eventually(t, what+": a stream was tried", func() bool { return len(n.api.watched(connectorPath("default", name))) > 0 })
		n.api.put(moved(name, "polled"))
		volumes[what].mustPublish()
		volumes[what].await(".gitconfig", "https://polled")
	}
	n.awaitWatches(1) // of the class
	for what, name := range names {
		tries := len(n.api.watched(connectorPath("default", name)))
		if limit := 6 + int(time.Since(began)/time.Second); tries > limit {
			t.Errorf("%s: %d tries in %v", what, tries, time.Since(began))
		}
		volumes[what].mustUnpublish()
	}
	n.wantForgotten()
}

// A stream that ended goes on from its last event or bookmark; only one that the API server cannot continue begins
// with the object as it is. Nothing is read for that if nothing has changed.
func TestStreamsGoOnWhereTheyEnded(t *testing.T) {
	for what, c := range sorted(map[string]struct {
		before func(n *node) // the stream ends
		want   []string      // the resourceVersions from which it is tried to go on
	}{
		"an event":   {func(n *node) {}, []string{"changed"}},
		"a bookmark": {func(n *node) { n.api.stream("default/default", gitPath).bookmark() }, []string{"last"}},
		"too old":    {func(n *node) { n.api.forgetHistory() }, []string{"changed", ""}},
		"too old for the server's first answer": {func(n *node) {
			n.api.answer("resourceVersion=", http.StatusGone, statusBody(410, "Expired", "too old resource version"))
		}, []string{"changed", ""}},
		"a restart": {func(n *node) { n.api.restart() }, []string{"changed", ""}},
	}) {
		t.Run(what, func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			n.api.put(moved("git", "changed"))
			v.await(".gitconfig", "https://changed")
			versions := map[string]string{"changed": strconv.Itoa(n.api.version), "": ""}
			n.api.put(connector("default", "other", "git")) // the server's version is a later one
			versions["last"] = strconv.Itoa(n.api.version)
			v.mustPublish()
			asked, generation, tried := n.api.count(""), v.generation(), len(n.api.watched(gitPath))
			c.before(n)
			n.api.set(func() {
				for s := range n.api.streams {
					s.end()
				}
			})
			eventually(t, "it is tried to go on", func() bool { return len(n.api.watched(gitPath)) == tried+len(c.want) })
			n.awaitWatches(2)
			for i, w := range n.api.watched(gitPath)[tried:] {
				if w.version != versions[c.want[i]] {
					t.Errorf("it goes on from %q, not %s (%q)", w.version, c.want[i], versions[c.want[i]])
				}
			}
			v.mustPublish()
			if got := n.api.count("") - asked; got != 0 || v.generation() != generation {
				t.Errorf("%d reads of what has not changed; the files are of generation %d and were of %d", got, v.generation(), generation)
			}
		})
	}
}

// What changes between the read and the beginning of the stream, or while there is none, is not lost.
func TestChangesWithoutAStream(t *testing.T) {
	n := startNode(t)
	gate := n.api.hold("watch=1")
	v := n.volume()
	v.settle()
	eventually(t, "the driver tries to watch", func() bool { return gate.waiting.Load() == 2 })
	n.api.put(moved("git", "before-the-stream"))
	gate.open()
	v.await(".gitconfig", "https://before-the-stream")
	for _, abort := range []bool{true, false} {
		n.awaitWatches(2)
		n.api.stream("default/default", gitPath).close(abort)
		n.api.put(moved("git", fmt.Sprint("after-it-", abort)))
		v.await(".gitconfig", fmt.Sprint("https://after-it-", abort))
	}
}

// What changes while the API server is away arrives without a call of kubelet.
func TestAPIServerAway(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	n.api.Close()
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="none"}`, 1)
	n.api.put(moved("git", "while-it-was-away"))
	v.pod.renewToken()
	v.mustPublish() // what was read is young enough
	v.want("token", v.pod.token)
	n.api.restart()
	v.await(".gitconfig", "https://while-it-was-away")
	n.awaitWatches(2)
}

// A change that could not be read is not forgotten when the stream has to begin again.
func TestChangeThatCouldNotBeRead(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	n.api.answer("/connectors/git", 500, statusBody(500, "InternalError", "etcd is gone"))
	n.api.put(moved("git", "changed"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unavailable"}`, 1)
	n.api.Close()
	n.api.answer("", 0, "")
	n.api.restart()
	v.await(".gitconfig", "https://changed")
}

// Nor is it when the stream is not opened again: kubelet's next call reads it, however young the last read is.
func TestChangeThatCouldNotBeReadBeforeItsStreamEnded(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	n.api.answer("/connectors/git", 500, statusBody(500, "InternalError", "etcd is gone"))
	n.api.put(moved("git", "changed"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unavailable"}`, 1)
	n.api.forbid("default/default", "watch "+gitPath)
	n.api.stream("default/default", gitPath).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`, 1)
	n.api.answer("", 0, "")
	v.mustPublish()
	if got := v.file(".gitconfig"); !strings.Contains(got, "https://changed") {
		t.Errorf("the file is %q", got)
	}
}

// A first publish has nothing that was read before it began, whatever happens to streams meanwhile.
func TestFirstPublishWhileAStreamEnds(t *testing.T) {
	n := startNode(t)
	n.watchedVolume()
	n.api.put(connector("default", "other", "git"))
	gate := n.api.hold(connectorPath("default", "other"))
	v, published := n.volume(attrs{"connector.name": "other"}), make(chan error)
	go func() { published <- v.publish() }()
	eventually(t, "the publish reads its Connector", func() bool { return gate.waiting.Load() == 1 })
	n.api.forbid(driverUser, "watch "+classPath("git"))
	n.api.stream(driverUser, classPath("git")).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectorclasses",verb="watch",code="403"}`, 1)
	n.api.put(classWith("new", "changed"))
	gate.open()
	must(t, <-published)
	v.want("new", "changed")
}

// A push that fails is logged and counted, kubelet's next call says the same, and the files stay. The next change is
// tried again.
func TestFailedPush(t *testing.T) {
	for code, c := range sorted(map[codes.Code]struct {
		words string
		fail  func(*apiServer)
	}{
		codes.FailedPrecondition: {"none", func(a *apiServer) { a.put(classWith("token", "{{ .connector.spec.none }}")) }},
		codes.InvalidArgument:    {"configuration", func(a *apiServer) { a.put(class("git", configuration("other"))) }},
		codes.NotFound:           {"not found", func(a *apiServer) { a.remove(gitPath) }},
	}) {
		t.Run(code.String(), func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			logged, before, files := len(logs.String()), v.generation(), v.read()
			c.fail(n.api)
			n.awaitMetric(fmt.Sprintf(`connectors_csi_pushes_total{code=%q}`, code), 1)
			line := regexp.MustCompile(`level=ERROR msg=push pod=default/` + v.pod.name + ` .*code=` + code.String() + ` .*` + c.words)
			eventually(t, "the failure is logged", func() bool { return line.MatchString(logs.String()[logged:]) })
			wantError(t, v.publish(), code, c.words)
			if !maps.Equal(v.read(), files) || v.generation() != before {
				t.Error("the files changed")
			}
			n.api.put(gitClass(), moved("git", "repaired"))
			v.await(".gitconfig", "https://repaired")
			n.awaitWatches(2)
		})
	}
}

// A volume that cannot be pushed waits 2, 4 and more seconds between two tries.
func TestPushesThatFailBecomeRarer(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	var failed []time.Time
	for i := range 3 {
		n.api.put(classWith("token", fmt.Sprintf("{{ .connector.spec.none%d }}", i)))
		n.awaitMetric(`connectors_csi_pushes_total{code="FailedPrecondition"}`, float64(i+1))
		failed = append(failed, time.Now())
	}
	if all := failed[2].Sub(failed[0]); all < 4*time.Second { // 2 and 4, less what the first took longer
		t.Errorf("three pushes failed within %v", all)
	}
	n.api.put(gitClass(), moved("git", "repaired"))
	v.await(".gitconfig", "https://repaired")
}

func TestConnectorMadeAgainAtOnce(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	n.api.remove(gitPath)
	n.api.put(moved("git", "another"))
	v.await(".gitconfig", "https://another")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
}

// A stream that begins without the object says by its first bookmark that there is none.
func TestConnectorThatIsGoneWhenItsStreamBegins(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	old := n.api.stream("default/default", gitPath)
	n.api.set(func() { delete(n.api.objects, gitPath) }) // as while the API server forgets what has happened
	old.send(`{"type":"ERROR","object":` + statusBody(http.StatusGone, "Expired", "too old") + "}\n")
	var begun *apiStream
	eventually(t, "another stream has begun", func() bool {
		begun = n.api.stream("default/default", gitPath)
		return begun != old
	})
	begun.send(`{"type":"BOOKMARK","object":{"metadata":{"resourceVersion":"1000"}}}` + "\n")
	n.awaitMetric(`connectors_csi_pushes_total{code="NotFound"}`, 1)
	wantError(t, v.publish(), codes.NotFound, "not found")
}

// When a Connector gets another class, that one is watched, and the old one no longer once nobody uses it.
func TestConnectorGetsAnotherClass(t *testing.T) {
	n := startNode(t)
	n.api.put(connector("default", "other", "git"), class("new", configuration("config", "file", "of the new class")))
	v, w := n.volume(), n.volume(attrs{"connector.name": "other"})
	v.settle()
	w.settle()
	n.awaitWatches(3)
	n.api.put(connector("default", "git", "new"))
	v.await("file", "of the new class")
	n.awaitWatches(4)
	n.api.put(class("new", configuration("config", "file", "changed")))
	v.await("file", "changed")
	n.api.put(connector("default", "other", "new"))
	w.await("file", "changed")
	n.awaitWatches(3)
	n.api.stream(driverUser, classPath("new"))
}

// What a ServiceAccount may no longer read does not reach its files, though its stream goes on; and others are not
// concerned.
func TestPermissionTakenAwayFromAStream(t *testing.T) {
	n := startNode(t)
	v, w := n.volume(), n.pod("default/builder").volume("config")
	v.settle()
	w.settle()
	n.awaitWatches(3)
	n.api.forbid("default/default", gitPath)
	for i := range 2 {
		secret := fmt.Sprintf("secret-%d", i)
		n.api.put(moved("git", secret))
		w.await(".gitconfig", secret)
		n.awaitMetric(`connectors_csi_pushes_total{code="PermissionDenied"}`, float64(i+1))
		wantError(t, v.publish(), codes.PermissionDenied, "may not read")
		if strings.Contains(v.file(".gitconfig"), "secret") {
			t.Fatalf("the file is %q", v.file(".gitconfig"))
		}
	}
	n.api.allow("default/default", gitPath)
	v.mustPublish()
	v.await(".gitconfig", "https://secret-1")
	n.api.put(moved("git", "allowed"))
	v.await(".gitconfig", "https://allowed")
}

// With a role that has get only, objects are polled, which is said once. With the next token it is tried again.
func TestRoleWithoutWatch(t *testing.T) {
	n := newNode(t)
	n.api.forbid("default/default", "watch "+gitPath)
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	logged, refused := len(logs.String()), `connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`
	v := n.volume()
	for i := range 3 {
		v.pod.renewToken()
		v.settle()
		n.awaitMetric(refused, float64(i+1))
	}
	lines := regexp.MustCompile(`level=WARN .*`+gitPath+`.*default/default`).FindAllString(logs.String()[logged:], -1)
	if len(lines) != 1 || !strings.Contains(lines[0], "watch") {
		t.Errorf("the log has %q", lines)
	}
	n.api.put(moved("git", "polled"))
	v.mustPublish()
	v.await(".gitconfig", "https://polled")
	n.api.allow("default/default", "watch "+gitPath)
	v.pod.renewToken()
	v.mustPublish()
	n.awaitWatches(2)
	n.api.put(moved("git", "pushed"))
	v.await(".gitconfig", "https://pushed")
}

// An API server that has just started knows no roles yet and refuses everything. That is no reason to poll for minutes.
func TestWatchThatIsRefusedOnce(t *testing.T) {
	n := startNode(t)
	logged, v, w := len(logs.String()), n.volume(), n.volume()
	v.settle()
	w.settle() // whose token is another, and no reason to try again at once
	n.awaitWatches(2)
	n.api.forbid("default/default", "watch "+gitPath)
	n.api.stream("default/default", gitPath).close(false)
	n.awaitMetric(`connectors_csi_api_requests_total{resource="connectors",verb="watch",code="403"}`, 1)
	n.api.allow("default/default", "watch "+gitPath)
	n.awaitWatches(2)
	n.api.put(moved("git", "pushed"))
	v.await(".gitconfig", "https://pushed")
	if strings.Contains(logs.String()[logged:], "polled") {
		t.Error("the log says that the object is polled")
	}
}

// Where it is the driver's role that has get only, the tokens of Pods are no reason to try again.
func TestDriversRoleWithoutWatch(t *testing.T) {
	n := newNode(t)
	n.api.forbid(driverUser, "watch "+classPath("git"))
	n.start(func(d *driver) { d.kube.refresh = time.Nanosecond })
	v := n.volume()
	for range 3 {
		v.pod.renewToken()
		v.settle()
		n.awaitMetric(`connectors_csi_api_requests_total{resource="connectorclasses",verb="watch",code="403"}`, 1)
	}
	n.api.put(class("git", configuration("config", "polled", "yes")))
	v.mustPublish()
	v.want("polled", "yes")
	v.mustUnpublish()
	n.wantForgotten()
	if tries := len(n.api.watched(classPath("git"))); tries > 2 { // the second after some seconds
		t.Errorf("%d tries to watch the class", tries)
	}
}

// endTokens makes the API server refuse the tokens that the Pods have.
func (a *apiServer) endTokens(pods ...*testPod) {
	a.set(func() {
		for _, p := range pods {
			a.ended[p.token] = true
		}
	})
}

// When the Pod is deleted that brought the newest token, the others of its ServiceAccount go on with theirs.
func TestPodOfTheNewestTokenIsDeleted(t *testing.T) {
	for _, unpublished := range []bool{true, false} {
		t.Run(fmt.Sprintf("its volume is unpublished: %v", unpublished), func(t *testing.T) {
			n := startNode(t)
			v := n.watchedVolume()
			w := n.volume()
			w.settle()
			n.api.endTokens(w.pod)
			if unpublished {
				w.mustUnpublish()
			}
			n.api.put(moved("git", "changed"))
			v.await(".gitconfig", "https://changed")
			n.api.stream("default/default", gitPath).close(false)
			n.awaitWatches(2)
			if token := n.api.stream("default/default", gitPath).token; token != v.pod.token {
				t.Error("the stream has another token than that of the Pod which is left")
			}
			n.api.put(moved("git", "changed-again"))
			v.await(".gitconfig", "https://changed-again")
		})
	}
}

// A ServiceAccount that is deleted and made again has new tokens, with which all goes on.
func TestServiceAccountMadeAgain(t *testing.T) {
	n := startNode(t)
	v, w := n.volume(), n.volume()
	v.settle()
	w.settle()
	n.awaitWatches(2)
	n.api.endTokens(v.pod, w.pod)
	n.api.put(moved("git", "nobody-may-read-it"))
	n.awaitMetric(`connectors_csi_pushes_total{code="Unauthenticated"}`, 2)
	for _, v := range []*podVolume{v, w} {
		wantError(t, v.publish(), codes.Unauthenticated)
		if strings.Contains(v.file(".gitconfig"), "nobody-may-read-it") {
			t.Error("it has read with a token that has ended")
		}
	}
	n.api.stream("default/default", gitPath).close(false)
	n.awaitWatches(1)
	v.pod.renewToken()
	v.mustPublish()
	v.await(".gitconfig", "https://nobody-may-read-it")
	n.awaitWatches(2)
	w.pod.renewToken()
	w.mustPublish()
	w.await(".gitconfig", "https://nobody-may-read-it")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	w.await(".gitconfig", "https://changed")
}

// The driver's own token ends and is replaced in its file: classes are watched with the new one.
func TestDriversTokenOfAStream(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	class := n.api.stream(driverUser, classPath("git"))
	n.api.set(func() { n.api.ended[class.token] = true })
	must(t, os.WriteFile(filepath.Join(serviceAccountDir, "token"), []byte(driverToken()), 0o600))
	class.close(false)
	n.awaitWatches(2)
	if n.api.stream(driverUser, classPath("git")).token == class.token {
		t.Error("the stream has the old token")
	}
	n.api.put(classWith("new", "changed"))
	v.await("new", "changed")
}

// classWith is the class "git" with another file.
func classWith(name, content string) object {
	return class("git", configuration("config", name, content))
}

// A node has at most 256 streams, and 64 for the Pods of a namespace. What is beyond is polled, until there is room.
func TestMoreObjectsThanStreams(t *testing.T) {
	n := startNode(t)
	n.api.put(class("git", configuration("config", "all", "{{ range .connectors }}{{ .spec.address }} {{ end }}")))
	const each, namespaces = 32, 5
	for i := range 3 * each {
		n.api.put(connector("default", fmt.Sprintf("c-%d", i), "git"))
	}
	volumes := map[string][]*podVolume{}
	for i := range namespaces {
		reader := fmt.Sprintf("team-%d/default", i)
		for j := range 3 {
			var names []string
			for k := range each {
				names = append(names, fmt.Sprintf("default/c-%d", each*j+k))
			}
			v := n.pod(reader).volume("config", attrs{"connector.name": "-", "connectors": strings.Join(names, ",")})
			v.settle()
			volumes[reader] = append(volumes[reader], v)
		}
	}
	polled := func() (number int, reader string) {
		n.api.mu.Lock()
		defer n.api.mu.Unlock()
		count, has := map[string]int{}, map[string]bool{}
		for s := range n.api.streams {
			count[s.reader]++
			has[s.reader+s.path] = true
		}
		for reader, number := range count {
			if number > 64 {
				t.Errorf("%s has %d streams", reader, number)
			}
		}
		for reader := range volumes {
			for i := range 3 * each {
				if !has[reader+connectorPath("default", fmt.Sprintf("c-%d", i))] {
					return i, reader
				}
			}
		}
		t.Error("everything is watched")
		return 0, "team-0/default"
	}
	n.awaitWatches(256)
	number, reader := polled()
	v := volumes[reader][number/each]
	n.api.put(moved(fmt.Sprintf("c-%d", number), "polled"))
	n.age()
	v.mustPublish()
	v.await("all", "https://polled")

	for _, v := range volumes["team-1/default"] {
		v.mustUnpublish()
	}
	delete(volumes, "team-1/default")
	for _, list := range volumes {
		for _, v := range list {
			v.mustPublish()
		}
	}
	n.awaitWatches(256)
	for _, list := range volumes {
		for _, v := range list {
			v.mustUnpublish()
		}
	}
	n.wantForgotten()
}

// A new resourceVersion, or a status that nobody prints, writes nothing.
func TestNothingIsWrittenIfNoByteChanges(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	generation, asked := v.generation(), n.api.count("")
	n.api.put(connector("default", "git", "git", with("Degraded", "status", "conditions")))
	n.awaitMetric(pushedOK, 1)
	n.api.put(gitClass())
	n.awaitMetric(pushedOK, 2)
	if v.generation() != generation {
		t.Error("it has written what was there already")
	}
	if got := n.api.count("") - asked; got != 2 {
		t.Errorf("%d reads for two changes", got)
	}
}

// An object is read once for all volumes of a ServiceAccount, also for those of one Pod, and its class once for all.
func TestChangeIsReadOnce(t *testing.T) {
	n := startNode(t)
	pod, builder := n.pod(), n.pod("default/builder")
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume(), n.volume(), builder.volume("a"), builder.volume("b")}
	for _, v := range volumes {
		v.settle()
	}
	n.awaitWatches(3)
	for what, c := range sorted(map[string]struct {
		path   string
		reads  int
		change object
	}{
		"Connector": {gitPath, 2, moved("git", "changed")},
		"class":     {classPath("git"), 1, classWith("new", "{{ .connector.spec.address }}")},
	}) {
		pushed, asked := n.readMetrics()[pushedOK], n.api.count("")
		n.api.put(c.change)
		n.awaitMetric(pushedOK, pushed+float64(len(volumes)))
		if got := n.api.count("") - asked; got != c.reads || n.api.count(c.path) == 0 {
			t.Errorf("%s: %d reads, not %d", what, got, c.reads)
		}
	}
	if got := n.readMetrics()["connectors_csi_push_duration_seconds_count"]; got != 2*float64(len(volumes)) {
		t.Errorf("%v pushes were timed", got)
	}
}

// A volume is pushed at most once a second, however often its objects change: the others wait for nothing.
func TestFloodOfChanges(t *testing.T) {
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"), connector("team-a", "events", "git"))
	hostile, events, v := n.pod("team-a/default").volume("config"), n.pod("team-a/default").volume("config", attrs{"connector.name": "events"}), n.volume()
	for _, v := range []*podVolume{hostile, events, v} {
		v.settle()
	}
	n.awaitWatches(4)
	flood, stop, done := n.api.stream("team-a/default", connectorPath("team-a", "events")), make(chan struct{}), make(chan int)
	began, pushed, asked := time.Now(), n.readMetrics()[pushedOK], n.api.count("")
	go func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				done <- i
				return
			case <-time.After(time.Millisecond):
				n.api.put(connector("team-a", "git", "git", with(fmt.Sprintf("https://%d", i), "spec", "address")))
				flood.send(fmt.Sprintf(`{"type":"MODIFIED","object":{"metadata":{"uid":"x","resourceVersion":"%d"}}}`, 1000+i) + "\n")
			}
		}
	}()
	for i := range 3 {
		n.api.put(moved("git", fmt.Sprintf("others-%d", i)))
		changed := time.Now()
		v.await(".gitconfig", fmt.Sprintf("https://others-%d", i))
		t.Logf("another volume's change took %v", time.Since(changed))
	}
	close(stop)
	last := <-done
	hostile.await(".gitconfig", fmt.Sprintf("https://%d\n", last-1))
	limit := 3 * (2 + time.Since(began).Seconds())
	if got := n.readMetrics()[pushedOK] - pushed; got > limit || last < 100 {
		t.Errorf("%v pushes of three volumes in %v, for %d changes", got, time.Since(began), last)
	}
	if got := n.api.count("") - asked; float64(got) > limit {
		t.Errorf("%d reads in %v", got, time.Since(began))
	}
}

// A call of kubelet that comes during a push is not told to come again, and has kubelet's new token.
func TestCallDuringAPush(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	asked, gate, result := n.api.count(gitPath), n.api.hold("/connectors/git"), make(chan error)
	n.api.put(moved("git", "changed"))
	eventually(t, "a push is under way", func() bool { return gate.waiting.Load() == 1 })
	v.pod.renewToken()
	go func() { result <- v.publish() }()
	eventually(t, "the call reads as well", func() bool { return n.api.count(gitPath) == asked+2 })
	gate.open()
	must(t, <-result)
	v.want("token", v.pod.token)
	v.await(".gitconfig", "https://changed")
}

// A change that comes during a call of kubelet is pushed after it, also to a volume that is only then mounted.
func TestPushDuringACall(t *testing.T) {
	for _, mounted := range []bool{true, false} {
		t.Run(fmt.Sprintf("mounted: %v", mounted), func(t *testing.T) {
			n := startNode(t)
			v, w := n.volume(attrs{"token.expiration": "1h"}), n.volume()
			w.settle()
			if mounted {
				v.settle()
				v.endToken()
			}
			n.awaitWatches(2)
			gate, result := n.api.hold("/token"), make(chan error)
			go func() { result <- v.publish() }()
			eventually(t, "the call asks for a token, and has read the Connector", func() bool { return gate.waiting.Load() == 1 })
			n.api.put(moved("git", "changed"))
			w.await(".gitconfig", "https://changed")
			gate.open()
			must(t, <-result)
			v.await(".gitconfig", "https://changed")
		})
	}
}

// A volume that is unpublished in the middle of its push is gone, at once and for ever.
func TestUnpublishDuringAPush(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	gate := n.api.hold("/connectors/git")
	n.api.put(moved("git", "changed"))
	eventually(t, "a push is under way", func() bool { return gate.waiting.Load() == 1 })
	logged := len(logs.String())
	v.mustUnpublish()
	gate.open()
	n.wantForgotten()
	v.wantNothing()
	if strings.Contains(logs.String()[logged:], "level=ERROR") {
		t.Errorf("the log has an error: %s", logs.String()[logged:])
	}
}

// A volume that somebody else has unmounted is forgotten with its streams; a push does not mount it again.
func TestUnmountedBySomebodyElse(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume()
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	n.api.put(moved("git", "changed"))
	eventually(t, "the driver knows no mount", func() bool { return len(mountsBelow(v.target)) == 0 })
	n.driver.forgetUnmounted()
	n.wantForgotten()
	if len(mountsBelow(v.target)) != 0 {
		t.Error("it is mounted again")
	}
}

// A volume that was never mounted has no streams.
func TestNoStreamForWhatIsNotMounted(t *testing.T) {
	n := startNode(t)
	n.api.put(class("broken", configuration("config", "file", "{{ .none }}")), connector("default", "broken", "broken"))
	n.volume(attrs{"connector.name": "broken"}).mustRefuse(codes.FailedPrecondition)
	n.volume(attrs{"connector.name": "none"}).mustRefuse(codes.NotFound)
	v := n.watchedVolume() // two streams, and no more
	v.mustUnpublish()
	n.wantForgotten()
	n.api.set(func() {
		for _, w := range n.api.watches {
			if w.path != gitPath && w.path != classPath("git") {
				t.Errorf("%s was watched", w.path)
			}
		}
	})
}

// A push uses the token that the driver asked for before.
func TestPushAsksForNoToken(t *testing.T) {
	n := startNode(t)
	v := n.watchedVolume(attrs{"token.expiration": "1h"})
	token := v.file("token")
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	v.want("token", token)
	if got := n.api.count(tokenPath("default", "default")); got != 1 {
		t.Errorf("%d TokenRequests", got)
	}
}

// Functions that give something else each time are rendered again when an input changes, and after a restart.
func TestRandomFunctionsAreRenderedOnce(t *testing.T) {
	n := startNode(t)
	n.api.put(class("git", configuration("config", "random", "{{ uuidv4 }}", "token", "{{ .context.token }}")))
	v := n.watchedVolume()
	seen := map[string]bool{}
	wantNew := func(what string) {
		t.Helper()
		random := v.file("random")
		if seen[random] {
			t.Errorf("%s: it was not rendered again", what)
		}
		seen[random] = true
		for range 3 {
			v.mustPublish()
		}
		if v.file("random") != random {
			t.Errorf("%s: it was rendered again for nothing", what)
		}
	}
	wantNew("at first")
	v.pod.renewToken()
	v.mustPublish()
	wantNew("a new token")
	n.api.put(connector("default", "git", "git"))
	eventually(t, "a change of the object renders it", func() bool { return !seen[v.file("random")] })
	n.awaitMetric(pushedOK, 1)
	wantNew("a change")
	n.stop()
	n.start()
	v.mustPublish()
	wantNew("a restart")
}

// Every call is validated, and every part of a request that the files are made from counts.
func TestEveryPartOfARequestCounts(t *testing.T) {
	n := startNode(t)
	declared := configuration("config", "token", "{{ .context.token }}", "value", "{{ .configurations.p }}")
	declared["params"] = []any{param("p", "default", "none")}
	n.api.put(class("git", declared, configuration("more", "more", "x")), connector("default", "other", "git"))
	v := n.watchedVolume()
	for _, step := range []struct {
		what   string
		change func()
	}{
		{"configurations", func() { v.attributes["configuration.names"] = "config,more" }},
		{"exclusions", func() { v.attributes["configuration.names"] = "config,more,!value" }},
		{"fewer exclusions", func() { v.attributes["configuration.names"] = "config,more" }},
		{"params", func() { v.attributes["configuration.params"] = `{"config":{"p":"new"}}` }},
		{"token", v.pod.renewToken},
		{"expiration", func() { v.attributes["token.expiration"] = "1h" }},
		{"Connector", func() {
			v.attributes["configuration.names"], v.attributes["connector.name"] = "config", "other"
		}},
		{"group", func() { v.change = group("0") }},
	} {
		before := v.generation()
		step.change()
		v.settle()
		after := v.generation()
		v.mustPublish()
		if v.generation() != after || after == before {
			t.Errorf("%s: generation %d became %d, and then %d", step.what, before, after, v.generation())
		}
	}
	for _, change := range []func(*csi.NodePublishVolumeRequest){
		func(r *csi.NodePublishVolumeRequest) { r.Readonly = false },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeId = "" },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeCapability = nil },
		func(r *csi.NodePublishVolumeRequest) { r.VolumeContext["unknown"] = "x" },
		group("x"),
	} {
		v.change = change
		wantError(t, v.publish(), codes.InvalidArgument)
	}
}

// counting is the class "git" with four files of the Connector's number, for readGeneration.
func counting(comment int) object {
	data := []string{}
	for _, name := range fourNames {
		data = append(data, name, fmt.Sprintf(`{{/* %d */}}{{ .connector.spec.number }}{{ "\n" }}{{ repeat 5000 "x" }}`, comment))
	}
	return class("git", configuration("config", data...))
}

var fourNames = []string{"a", "b", "c", "d"}

func numberedConnector(name string, number int) object {
	return connector("default", name, "git", with(number, "spec", "number"))
}

// readWhole reads the files of a volume over and over until it is stopped. Each is whole, and those of a generation
// are of one number. A reader that is overtaken by two updates begins again.
func readWhole(dir string, stop chan struct{}) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		before, _ := os.Readlink(dir + "/..data")
		err := cmp.Or(readNames(dir, fourNames), readGeneration(dir, fourNames))
		after, _ := os.Readlink(dir + "/..data")
		if err != nil && (before == after || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
	}
}

// Objects change faster than they are pushed, while kubelet publishes, republishes and unpublishes the same volumes:
// no call fails, readers see whole generations only, and in the end every volume has the newest content without
// another call. Nothing is left of volumes that are gone.
func TestPushesAmongCalls(t *testing.T) {
	n := startNode(t)
	n.api.put(counting(0), numberedConnector("git-0", 0), numberedConnector("git-1", 0))
	var volumes []*podVolume
	for i := range 8 {
		pod := n.pod([]string{"default/default", "default/builder"}[i/2%2])
		volumes = append(volumes, pod.volume("config", attrs{"connector.name": fmt.Sprintf("git-%d", i%2)}))
		volumes[i].settle()
	}
	n.awaitWatches(5)
	descriptorsBefore := descriptors(t)
	stop, results, changes := make(chan struct{}), make(chan error), make(chan int)
	go func() {
		for i := 1; ; i++ {
			select {
			case <-stop:
				changes <- i
				return
			case <-time.After(time.Millisecond):
				n.api.put(numberedConnector(fmt.Sprintf("git-%d", i%2), i))
				if i%50 == 0 {
					n.api.put(counting(i))
				}
			}
		}
	}()
	for _, v := range volumes[:4] {
		go func(dir string) { results <- readWhole(dir, stop) }(startContainer(t, v))
	}
	calls := make(chan error)
	for i, v := range volumes {
		go func() {
			var err error
			for round := 0; round < 100 && err == nil; round++ {
				if round%20 == 0 {
					v.pod.renewToken()
				}
				if i >= 4 && round%5 == 0 { // this one comes and goes
					err = v.unpublish()
				}
				err = cmp.Or(err, v.publish())
			}
			calls <- err
		}()
	}
	for range volumes {
		if err := <-calls; err != nil {
			t.Error(err)
		}
	}
	close(stop)
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	last := <-changes
	n.api.put(numberedConnector("git-0", last), numberedConnector("git-1", last))
	for _, v := range volumes {
		v.await("a", fmt.Sprintf("%d\n", last))
		v.mustPublish()
		v.wantClean()
	}
	t.Logf("%d changes, %v pushes", last, n.readMetrics()[pushedOK])
	for _, v := range volumes {
		v.mustUnpublish()
	}
	n.wantForgotten()
	n.driver.renderers.close()
	eventually(t, fmt.Sprintf("there are %d descriptors as before", descriptorsBefore), func() bool { return descriptors(t) <= descriptorsBefore })
}

// Killed in the middle of pushes, and started again, the driver leaves whole files, and goes on with kubelet's call.
func TestKilledDuringPushes(t *testing.T) {
	n := newNode(t)
	number := 0
	change := func() {
		number++
		n.api.put(numberedConnector("git", number))
	}
	n.api.put(counting(0))
	change()
	volumes := []*podVolume{n.volume(), n.volume()}
	stop, results, readers := make(chan struct{}), make(chan error, 2), 0
	for round := range 8 {
		p := n.startBinary(rendererBinary(), anHour)
		for _, v := range volumes {
			v.settle()
			if readers < len(volumes) {
				readers++
				go func(dir string) { results <- readWhole(dir, stop) }(startContainer(t, v))
			}
		}
		n.awaitWatches(2)
		change()
		for range round * 5 / 2 { // another moment each time
			time.Sleep(100 * time.Microsecond)
			change()
		}
		p.kill()
		n.api.awaitStreams(0)
		change()
	}
	n.startBinary(rendererBinary(), anHour)
	for _, v := range volumes {
		v.mustPublish()
		v.await("a", fmt.Sprintf("%d\n", number))
	}
	n.awaitWatches(2)
	change()
	for _, v := range volumes {
		v.await("a", fmt.Sprintf("%d\n", number))
		v.mustPublish()
		v.wantClean()
	}
	close(stop)
	for range volumes {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// After a restart the first call writes nothing if nothing has changed, and from it on changes are pushed again.
func TestRestartOfAWatchingDriver(t *testing.T) {
	n := newNode(t)
	p := n.startBinary(rendererBinary(), anHour)
	v := n.watchedVolume()
	generation := v.generation()
	must(t, p.Process.Signal(syscall.SIGTERM)) // which no stream delays
	p.awaitExit(t)
	if code := p.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit code %d", code)
	}
	n.api.awaitStreams(0)
	n.startBinary(rendererBinary(), anHour)
	v.settle()
	if v.generation() != generation {
		t.Error("the first call has written what was there already")
	}
	n.awaitWatches(2)
	n.api.put(moved("git", "changed"))
	v.await(".gitconfig", "https://changed")
	if !strings.Contains(p.log.String(), "stopped") {
		t.Errorf("the log is %s", p.log)
	}
}

// ---- Rendering ----

// rendered publishes a volume of one file, from a Connector with some fields, and returns the file.
func (n *node) rendered(text string, change ...func(object)) (string, error) {
	n.t.Helper()
	spec := object{"connectorClassName": "class", "address": "https://example.com", "number": 3, "big": 12345678901, "float": 1.5, "yes": true,
		"null": nil, "nulls": []any{nil}, "list": []any{"a", 1, 2.5}, "empty": "", "map": object{"key": "value"}}
	n.api.put(class("class", configuration("config", "file", text)), connector("default", "rendered", "class", append([]func(object){with(spec, "spec")}, change...)...))
	v := n.volume(attrs{"connector.name": "rendered"})
	if err := v.publish(); err != nil {
		v.wantNothing()
		return "", err
	}
	return v.file("file"), v.unpublish()
}

func TestTemplates(t *testing.T) {
	n := startNode(t)
	for template, want := range sorted(map[string]string{
		"":                      "",
		"plain\ntext\n":         "plain\ntext\n",
		`{{ "a" -}}   b`:        "ab",
		`{{/* a comment */}}x`:  "x",
		`{{ .connector.kind }}`: "Connector",
		`{{ .connector.metadata.name }}|{{ .connector.name }}|{{ .connector.namespace }}`: "rendered|rendered|default",
		`{{ (index .connectors 0).status.proxyAddress }}`:                                 "http://c-rendered.default.svc.cluster.local",
		`{{ (index .connector.status.conditions 0).type }}`:                               "Ready",
		`{{ .context.proxy.caCert }}`:                                                     "",
		`{{ index .configurations "none" | default "x" }}`:                                "x",

		// Numbers are what they were in the object.
		`{{ .connector.spec.number }} {{ .connector.spec.big }} {{ .connector.spec.float }}`: "3 12345678901 1.5",
		`{{ add .connector.spec.number 1 }} {{ eq .connector.spec.number 3 }}`:               "4 true",
		`{{ .connector.spec.list }} {{ toJson .connector.spec.list }}`:                       `[a 1 2.5] ["a",1,2.5]`,
		`{{ printf "%d" .connector.spec.number }}`:                                           "3",

		// Missing values are nothing, as long as they are not printed.
		`{{ if .connector.spec.none }}a{{ else }}b{{ end }}`:                                                                         "b",
		`{{ if .connector.spec.none.of.this }}a{{ end }}`:                                                                            "",
		`{{ if not .connector.spec.none }}a{{ end }}`:                                                                                "a",
		`{{ if and .connector.spec.none true }}a{{ end }}`:                                                                           "",
		`{{ if .connector.spec.null }}a{{ else }}b{{ end }}`:                                                                         "b",
		`{{ range .connector.spec.none }}a{{ end }}`:                                                                                 "",
		`{{ range .connector.spec.none }}a{{ else }}b{{ end }}`:                                                                      "b",
		`{{ with .connector.spec.none }}a{{ else }}b{{ end }}`:                                                                       "b",
		`{{ with .connector.spec.none }}a{{ else with .connector.kind }}{{ . }}{{ end }}`:                                            "Connector",
		`{{ default "x" .connector.spec.none }}`:                                                                                     "x",
		`{{ .connector.spec.none.of.this | default "x" }}`:                                                                           "x",
		`{{ .connector.spec.null | default "x" }}`:                                                                                   "x",
		`{{ coalesce .connector.spec.none .connector.spec.empty "x" }}`:                                                              "x",
		`{{ $x := .connector.spec.none }}{{ $x | default "x" }}`:                                                                     "x",
		`{{ $x := .connector.spec.none }}{{ $x = "y" }}{{ $x }}`:                                                                     "y",
		`{{ hasKey .connector.spec "null" }} {{ empty .connector.spec.none }}`:                                                       "false true",
		`{{ .connector.spec.empty }}`:                                                                                                "",
		`{{ print "a" 1 }} {{ println "b" }}{{ urlquery "a/b" }} {{ html "<" }} {{ js "'" }} {{ toString 1 }} {{ printf "%s" "c" }}`: "a1 b\na%2Fb &lt; \\' 1 c",

		// sprig
		`{{ "a" | upper | b64enc }} {{ list 1 2 | join "," }} {{ (urlParse "https://h:1/p").hostname }} {{ dict "a" 1 | toJson }}`: `QQ== 1,2 h {"a":1}`,
		`{{ sha256sum "a" | trunc 8 }} {{ splitList "," "a,b" | last }} {{ trimPrefix "/" "/a" }} {{ ternary "y" "n" true }}`:      "ca978112 b a y",

		// Templates, loops
		`{{ define "t" }}<{{ . }}>{{ end }}{{ template "t" .connector.kind }}{{ block "b" 1 }}{{ . }}{{ end }}`:                                  "<Connector>1",
		`{{ range $i, $e := .connector.spec.list }}{{ if eq $i 1 }}{{ continue }}{{ end }}{{ $e }}{{ if eq $i 2 }}{{ break }}{{ end }}{{ end }}`: "a2.5",
		`{{ range 3 }}{{ . }}{{ end }}`: "012",
	}) {
		got, err := n.rendered(template)
		if err != nil || got != want {
			t.Errorf("%s\n\tis %q, not %q (%v)", template, got, want, err)
		}
	}
}

func TestTemplatesThatFail(t *testing.T) {
	n := startNode(t)
	missing := "no value"
	for template, word := range sorted(map[string]string{
		// Printing a missing value
		`{{ .connector.spec.none }}`:                                        "file line 1: {{ .connector.spec.none }} has no value",
		"\n\n  {{ .connector.spec.none }}":                                  "file line 3: {{ .connector.spec.none }} has no value",
		`{{.connector.spec.null}}`:                                          "file line 1: {{ .connector.spec.null }} has no value",
		`{{ .connector.spec.none.of.this }}`:                                "{{ .connector.spec.none.of.this }} has no value",
		`{{ index .connector.spec "none" }}`:                                missing,
		`{{ get .connector.spec "none" | default nil }}`:                    missing,
		`{{ $x := .connector.spec.none }}{{ $x }}`:                          missing,
		`{{ range .connector.spec.nulls }}{{ . }}{{ end }}`:                 missing,
		`{{ if true }}{{ .none }}{{ end }}`:                                 missing,
		`{{ if false }}{{ else }}{{ .none }}{{ end }}`:                      missing,
		`{{ with .connector }}{{ .none }}{{ end }}`:                         missing,
		`{{ with .none }}{{ else }}{{ .none }}{{ end }}`:                    missing,
		`{{ range list 1 }}{{ $.none }}{{ end }}`:                           missing,
		`{{ range .none }}{{ else }}{{ .none }}{{ end }}`:                   missing,
		`{{ define "t" }}{{ .none }}{{ end }}{{ template "t" .connector }}`: missing,
		`{{ template "t" .none }}{{ define "t" }}{{ . }}{{ end }}`:          missing,
		`{{ block "b" .connector }}{{ .none }}{{ end }}`:                    missing,
		`{{ (.connector.spec.none) }}`:                                      missing,
		`{{ print "a" .connector.spec.none }}`:                              "value 2 to print is missing",
		`{{ printf "%s" .connector.spec.none }}`:                            "value 1 to print is missing",
		`{{ println .connector.spec.none }}`:                                "value 1 to print is missing",
		`{{ urlquery .connector.spec.none }}`:                               "value 1 to print is missing",
		`{{ .connector.spec.none | html }}`:                                 "value 1 to print is missing",
		`{{ .connector.spec.none | js }}`:                                   "value 1 to print is missing",
		`{{ .connector.spec.none | toString }}`:                             "value 1 to print is missing",
		`{{ .connector.spec.none | b64enc }}`:                               "invalid value; expected string",
		`{{ urlParse .connector.spec.none }}`:                               "invalid value; expected string",

		// What would give away the driver's environment or network, and what the guards use
		`{{ env "NODE_NAME" }}`:           `"env" not defined`,
		`{{ expandenv "$NODE_NAME" }}`:    `"expandenv" not defined`,
		`{{ getHostByName "localhost" }}`: `"getHostByName" not defined`,
		`{{ timeLeft }}`:                  `"timeLeft" not defined`,

		// Other failures
		`{{ required "x" .none }}`:        `"required" not defined`,
		`{{ fail "on purpose" }}`:         `file line 1, column 3, at <fail "on purpose">: on purpose`,
		`{{ template "none" }}`:           `"none" not defined`,
		`{{ .connector.spec.address.x }}`: "can't evaluate field x",
		`{{ index .connectors 1 }}`:       "out of range",
		`{{ end }}`:                       "unexpected {{end}}",
	}) {
		got, err := n.rendered(template)
		if got != "" {
			t.Errorf("%s\n\tis %q", template, got)
		}
		wantError(t, err, codes.FailedPrecondition, `ConnectorClass "class", configuration "config": file line `, word)
		if text := err.Error(); strings.Contains(text, checkValue) || strings.Contains(text, "executing") || strings.Contains(text, "error calling") {
			t.Errorf("not in plain words: %v", err)
		}
	}
}

// The driver's log and its errors are searched for secrets in every test; here templates try to get them there.
func TestTemplatesThatWantToTellTheToken(t *testing.T) {
	n := startNode(t)
	for _, template := range []string{
		`{{ fail .context.token }}`,
		`{{ fail (b64enc .context.token) }}`,
		`{{ fail (printf ":%s" .context.token | b64enc) }}`,
		`{{ fail (trunc 300 .context.token) }}`,
		`{{ fail (substr 10 60 .context.token) }}`,
		`{{ fail (toJson .context) }}`,
		`{{ fail (printf "%v" .context) }}`,
		`{{ .context.token.x }}`,
		`{{ index .context.token "x" }}`,
		`{{ index .connectors .context.token }}`,
		`{{ index .connector .context.token }}`,
		`{{ mustToDate "2006" .context.token | date "2006" }}`,
		`{{ mustRegexMatch (print "(" .context.token) "x" }}`,
		`{{ mustFromJson .context.token }}`,
		`{{ template "x" .context.token }}{{ define "x" }}{{ .y }}{{ end }}`,
		`{{ slice .context.token 1 100000 }}`,
		`{{ call .context.token }}`,
		`{{ len 3 .context.token }}`,
		`{{ semver .context.token }}`,
		`{{ genSelfSignedCert .context.token (list .context.token) nil 1 }}`,
		`{{ buildCustomCert .context.token .context.token }}`,
		`{{ decryptAES .context.token .context.token }}`,
		`{{ if hasPrefix "TOKEN" .context.token }}{{ else }}{{ fail .context.token }}{{ end }}`,
	} {
		if got, err := n.rendered(template); err == nil {
			t.Errorf("%s\n\tis %q", template, got)
		}
	}
	// These do not fail, and are files.
	for _, template := range []string{`{{ atoi .context.token }}`, `{{ b64dec .context.token | len }}`, `{{ .context }}`} {
		if _, err := n.rendered(template); err != nil {
			t.Error(err)
		}
	}
	if _, err := n.rendered("{{ .connector.metadata.annotations.mark }}{{ .connector.none }}"); err == nil {
		t.Error("half a file was published")
	}
}

func TestOutputLimit(t *testing.T) {
	n := startNode(t)
	if got, err := n.rendered(`{{ repeat 1048576 "x" }}`); err != nil || len(got) != 1<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for _, template := range []string{`{{ repeat 1048576 "x" }}y`, `{{ range 9000000000000 }}x{{ end }}`} {
		_, err := n.rendered(template)
		wantError(t, err, codes.FailedPrecondition, "a volume may hold 1024 KiB in 256 files")
	}
	// A file that replaces another one counts once.
	n.api.put(class("git", configuration("one", "a", `{{ repeat 1048576 "x" }}`), configuration("two", "a", `{{ repeat 1048576 "y" }}`)))
	v := n.volume(attrs{"configuration.names": "one,two"})
	v.mustPublish()
	v.want("a", strings.Repeat("y", 1<<20))
}

// Other files and other volumes share the objects, and sprig has functions that change their arguments.
func TestTemplatesCannotChangeWhatOthersSee(t *testing.T) {
	n := startNode(t)
	change := `{{ $_ := set .connector.spec "address" "changed" }}{{ $_ := set .context "token" "changed" }}{{ $_ := unset .connector.metadata "name" }}` +
		`{{ $_ := set .configurations "p" "changed" }}{{ $_ := set (index .connector.spec.list 0) "x" "changed" }}{{ .connector.spec.address }}`
	see := `{{ .connector.spec.address }} {{ .connector.metadata.name }} {{ .configurations.p }} {{ (index .connector.spec.list 0).x }}`
	n.api.put(class("git", configuration("config", "a", change, "b", see)),
		connector("default", "git", "git", with([]any{object{"x": "kept"}}, "spec", "list")))
	v, w := n.volume(attrs{"configuration.params": `{"config":{"p":"kept"}}`}), n.volume(attrs{"configuration.params": `{"config":{"p":"kept"}}`})
	for range 2 {
		for _, v := range []*podVolume{v, w} {
			v.pod.renewToken() // so that the files are made again, from the cache
			v.mustPublish()
			v.want("a", "changed")
			v.want("b", "https://git.example.com git kept kept")
		}
	}
}

func TestFileNames(t *testing.T) {
	for name, ok := range sorted(map[string]bool{
		"a": true, ".a": true, "a.b": true, "a..b": true, "-": true, "_": true, "A-z_0.9": true, ".env": true, "...": false, strings.Repeat("a", 253): true,
		"": false, ".": false, "..": false, "..a": false, "..data": false, "a/b": false, "/a": false, "a\\b": false, "a b": false, "a\n": false, "é": false,
		"a\x00": false, "a:b": false, strings.Repeat("a", 254): false,
	}) {
		if err := checkFileName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	n := startNode(t)
	for _, name := range []string{"..data", "..gen-x", "a/b", "a b", ""} {
		n.api.put(class("git", configuration("config", "ok", "x", name, "x")))
		n.volume().mustRefuse(codes.FailedPrecondition, fmt.Sprintf("file name %q is not allowed", name))
	}
}

// ---- The documented ConnectorClasses: what they make is read by the rules of its format ----

// parseGitConfig reads git-config(1): sections, subsections in quotes, keys; a key's values by "section.subsection.key".
func parseGitConfig(t *testing.T, text string) map[string][]string {
	t.Helper()
	header := regexp.MustCompile(`^\[([-.a-zA-Z0-9]+)(?: "((?:[^"\\]|\\.)*)")?\]$`)
	key := regexp.MustCompile(`^([a-zA-Z][-a-zA-Z0-9]*) *= *(.*)$`)
	values, section := map[string][]string{}, ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if match := header.FindStringSubmatch(line); match != nil {
			section = match[1] + "." + match[2]
		} else if match := key.FindStringSubmatch(line); match != nil && section != "" {
			values[section+"."+match[1]] = append(values[section+"."+match[1]], match[2])
		} else if line != "" && line[0] != '#' && line[0] != ';' {
			t.Errorf("not a line of a git configuration: %q", line)
		}
	}
	return values
}

func basic(text string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(text))
}

func TestDocumentedGitClasses(t *testing.T) {
	n := startNode(t)
	const one, two = "http://c-git.default.svc.cluster.local", "http://c-other.team-a.svc.cluster.local"
	for what, c := range sorted(map[string]struct {
		file string
		want func(token string) map[string][]string
		both bool // also with two Connectors
	}{
		"1.0": {"[http]\n  sslVerify = false\n", func(string) map[string][]string { return map[string][]string{"http..sslVerify": {"false"}} }, false},
		"1.0 to 1.8": {"[http]\n    extraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n" +
			"[url \"{{ .connector.status.proxyAddress }}\"]\n    insteadOf = {{.connector.spec.address}}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(":" + token)}, "url." + one + ".insteadOf": {"https://git.example.com"}}
			}, false},
		"1.9": {"[http]\n    extraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n{{- range .connectors }}\n" +
			"[url \"{{ .status.proxyAddress }}\"]\n    insteadOf = {{.spec.address}}\n{{- end }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(":" + token)}, "url." + one + ".insteadOf": {"https://git.example.com"},
					"url." + two + ".insteadOf": {"https://other.example.com"}}
			}, true},
		"a parameter of the Connector": {"{{ $sslVerify := \"true\" -}}\n{{- range .connector.spec.params }}{{- if eq .name \"sslVerify\" }}{{$sslVerify = .value }}{{ end }}{{- end }}\n" +
			"[http]\n  sslVerify = {{ $sslVerify }}\n", func(string) map[string][]string { return map[string][]string{"http..sslVerify": {"true"}} }, false},
		"1.6, without colon": {"[http]\n    extraHeader = Authorization: Basic {{ .context.token | b64enc }}\n[url \"{{ .connector.status.proxyAddress }}\"]\n    insteadOf = {{ .connector.spec.address }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(token)}, "url." + one + ".insteadOf": {"https://git.example.com"}}
			}, false},
		"1.12": {"{{- range .connectors }}\n[http \"{{ .status.proxy.httpAddress.url }}\"]\n    extraHeader = Authorization: Basic {{ printf \":%s\" $.context.token | b64enc }}\n" +
			"[url \"{{ .status.proxy.httpAddress.url }}\"]\n    insteadOf = {{.spec.address}}\n{{- end }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http." + one + ".extraHeader": {basic(":" + token)}, "url." + one + ".insteadOf": {"https://git.example.com"},
					"http." + two + ".extraHeader": {basic(":" + token)}, "url." + two + ".insteadOf": {"https://other.example.com"}}
			}, true},
	}) {
		t.Run(what, func(t *testing.T) {
			n.api.put(class("git", configuration("config", ".gitconfig", c.file)), connector("team-a", "other", "git"))
			v := n.volume()
			v.mustPublish()
			want := c.want(v.pod.token)
			if c.both {
				w := n.volume(attrs{"connector.name": "-", "connectors": "git, team-a/other"})
				w.mustPublish()
				if got, want := parseGitConfig(t, w.file(".gitconfig")), c.want(w.pod.token); !maps.EqualFunc(got, want, slices.Equal) {
					t.Errorf("two Connectors: %v, not %v", got, want)
				}
				maps.DeleteFunc(want, func(key string, _ []string) bool { return strings.Contains(key, two) })
			}
			if got := parseGitConfig(t, v.file(".gitconfig")); !maps.EqualFunc(got, want, slices.Equal) {
				t.Errorf("%v, not %v", got, want)
			}
		})
	}
	n.api.put(class("git", configuration("config", ".gitconfig", "this is git config\n")), connector("default", "git", "git", with(nil, "status")))
	v := n.volume() // the quick start: no proxy at all
	v.mustPublish()
	v.want(".gitconfig", "this is git config\n")

	n.api.put(class("git", configuration("config", ".gitconfig", "{{ range .connector.spec.params }}{{ .name }}={{ .value }}{{ end }}")),
		connector("default", "git", "git", with([]any{object{"name": "sslVerify", "value": "false"}}, "spec", "params")))
	v = n.volume()
	v.mustPublish()
	v.want(".gitconfig", "sslVerify=false")
}

const npmHead = `{{- $proxyURL := urlParse .connector.status.proxyAddress -}}
{{- $password := .context.token -}}
{{- $registryURL := urlParse .connector.spec.address -}}
{{- $username := printf "%s/%s" .connector.metadata.namespace .connector.metadata.name | urlquery -}}
`

const npmrc = npmHead + `# NPM Registry Configuration
registry={{ trimSuffix "/" .connector.spec.address }}/

# The authentication token is fake, because the connector will not use it, it will be used for proxy requests.
//{{ $registryURL.host }}/{{ trimSuffix "/" (trimPrefix "/" $registryURL.path) }}/:_auth={{ printf "user:password" | b64enc }}

# Set the connector proxy URL for npm registry access
https-proxy={{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}
proxy={{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}

# Disable strict SSL verification for internal registries
strict-ssl=false

# Disable npm audit to avoid security warnings during CI/CD
audit=false

# Disable funding messages to reduce output noise
fund=false
`

const yarnrc = npmHead + `# Set the NPM registry server URL for package resolution
npmRegistryServer: "{{ .connector.spec.address }}"

# The authentication token is fake, because the connector will not use it, it will be used for proxy requests.
npmAuthIdent: "{{ printf "user:password" | b64enc }}"

# The unsafeHttpWhitelist is used to whitelist the host for proxy requests.
unsafeHttpWhitelist:
- {{ $registryURL.hostname }}

# authentication for proxy requests
httpProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
httpsProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"

# Always authenticate to the registry
npmAlwaysAuth: true

# Disable strict SSL verification for internal registries
enableStrictSsl: false

# Set the registry URL for package publishing
npmPublishRegistry: "{{ .connector.spec.address }}"
`

// parseLines reads key and value of every line that is not empty or a comment.
func parseLines(t *testing.T, text string, line *regexp.Regexp) map[string]string {
	t.Helper()
	values := map[string]string{}
	for l := range strings.Lines(text) {
		l = strings.TrimSuffix(l, "\n")
		if match := line.FindStringSubmatch(l); match != nil {
			values[match[1]] = match[2]
		} else if l != "" && l[0] != '#' && l[0] != ';' {
			t.Errorf("a line that %v does not match: %q", line, l)
		}
	}
	return values
}

func TestDocumentedNPMClass(t *testing.T) {
	n := startNode(t)
	n.api.put(class("npm", configuration("npmrc", "ca.cert", "{{ .context.proxy.caCert }}", ".npmrc", npmrc),
		configuration("yarnrc", "ca.cert", "{{ .context.proxy.caCert }}", ".yarnrc.yml", yarnrc)),
		connector("default", "npm", "npm", with("https://nexus.example.com:8443/repository/npm/", "spec", "address"), with(certificate("the CA"), "status", "proxy", "httpAddress", "CACerts")))
	v := n.volume(attrs{"connector.name": "npm", "configuration.names": "npmrc, yarnrc"})
	v.mustPublish()
	v.wantFiles(".npmrc", ".yarnrc.yml", "ca.cert")
	v.want("ca.cert", certificate("the CA"))
	proxy := "http://default%2Fnpm:" + v.pod.token + "@c-npm.default.svc.cluster.local"
	if u, err := url.Parse(proxy); err != nil || u.User.Username() != "default/npm" {
		t.Fatal(err)
	}

	ini := parseLines(t, v.file(".npmrc"), regexp.MustCompile(`^([^#;=\[\]]+)=(.*)$`))
	if want := (map[string]string{
		"registry": "https://nexus.example.com:8443/repository/npm/", "//nexus.example.com:8443/repository/npm/:_auth": "dXNlcjpwYXNzd29yZA==",
		"https-proxy": proxy, "proxy": proxy, "strict-ssl": "false", "audit": "false", "fund": "false",
	}); !maps.Equal(ini, want) {
		t.Errorf(".npmrc is %v, not %v", ini, want)
	}

	yaml := parseLines(t, v.file(".yarnrc.yml"), regexp.MustCompile(`^(?:- )?([a-zA-Z.]+):? ?"?([^"]*)"?$`))
	if want := (map[string]string{
		"npmRegistryServer": "https://nexus.example.com:8443/repository/npm/", "npmPublishRegistry": "https://nexus.example.com:8443/repository/npm/",
		"npmAuthIdent": "dXNlcjpwYXNzd29yZA==", "unsafeHttpWhitelist": "", "nexus.example.com": "", "httpProxy": proxy, "httpsProxy": proxy,
		"npmAlwaysAuth": "true", "enableStrictSsl": "false",
	}); !maps.Equal(yaml, want) {
		t.Errorf(".yarnrc.yml is %v, not %v", yaml, want)
	}
}

func TestDocumentedClassesForSeveralConnectors(t *testing.T) {
	n := startNode(t)
	lines := "{{- range .connectors }}\n# Configuration for Connector: {{ .name }}\nparam_name = {{ .name }}\nparam_value = {{ .spec.address }}\n{{- end }}\n"
	n.api.put(class("multi-connector", configuration("config", ".multi-connector-config", lines)),
		connector("default", "a", "multi-connector"), connector("team-a", "b", "multi-connector"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "a,team-a/b"})
	v.mustPublish()
	v.want(".multi-connector-config", "\n# Configuration for Connector: a\nparam_name = a\nparam_value = https://a.example.com"+
		"\n# Configuration for Connector: b\nparam_name = b\nparam_value = https://b.example.com\n")

	n.api.put(class("connector-a", configuration("config-a", "config.xml", lines)),
		class("connector-b", configuration("config-b", "settings.json",
			"{\"connectors\": [\n{{- range .connectors }}\n  {\"name\": \"{{ .name }}\", \"address\": \"{{ .spec.address }}\"},\n{{- end }}\n]}\n")),
		connector("default", "a", "connector-a"), connector("team-a", "b", "connector-b"))
	v = n.volume(attrs{"connector.name": "-", "connectors": "a,team-a/b", "configuration.names": "config-a,config-b"})
	v.mustPublish()
	v.want("config.xml", "\n# Configuration for Connector: a\nparam_name = a\nparam_value = https://a.example.com\n")
	v.want("settings.json", "{\"connectors\": [\n  {\"name\": \"b\", \"address\": \"https://b.example.com\"},\n]}\n")
}

// ---- The renderer ----

// startedAsRenderer is what this program does where a driver has started it as a renderer. By another name than its
// own it is not the one that it should be: an impostor, or the real one with code in it that tries what it can do.
func startedAsRenderer() (exitCode int) {
	name := filepath.Base(os.Args[0])
	if i, err := strconv.Atoi(strings.TrimPrefix(name, "impostor-")); err == nil {
		return impostors()[i].serve()
	}
	if address, ok := strings.CutPrefix(name, "intruder-"); ok {
		os.Setenv(intruderKey, address) // for the second half
	}
	if address := os.Getenv(intruderKey); address != "" && os.Args[1] == serveArgument {
		requests := os.Stdin
		os.Stdin, _, _ = os.Pipe()
		go func() {
			readFrame(requests, maxFrameBytes) // by then it has given up all that it gives up
			intrude(address)
		}()
	}
	return rendererMain(os.Args[1:])
}

// children returns the processes that a process has started and not waited for, with their states.
func children(t testing.TB, parent int) map[int]string {
	t.Helper()
	found := map[int]string{}
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	must(t, err)
	for _, path := range paths {
		text, _ := os.ReadFile(path) // it may be gone
		i := bytes.LastIndexByte(text, ')')
		if f := strings.Fields(string(text[i+1:])); len(f) > 2 && f[1] == strconv.Itoa(parent) {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			must(t, err)
			found[pid] = f[0]
		}
	}
	return found
}

// processStatus returns a field of /proc/<pid>/status.
func processStatus(t testing.TB, pid int, field string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("/proc/%d/status has no %s", pid, field)
	return ""
}

func kilobytes(t testing.TB, pid int, field string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSuffix(processStatus(t, pid, field), " kB"))
	must(t, err)
	return n
}

// hostile is what somebody may write so that others get no Pods, and how it has to end.
type hostile struct {
	what     string
	template string // of the file "file"
	message  string // a regular expression; none: it does no harm
}

// What the driver says of the file that a renderer died of. It stops one after 5 s where the machine is busy.
const (
	takesMemory = `, file "file": rendering it takes more than 64 MiB of memory$`
	takesTime   = `, file "file": rendering it takes more than (2s of processor time|5s)$`
	takesEither = `, file "file": rendering it takes more than (64 MiB of memory|2s of processor time|5s)$`
	failsPlain  = `: file line 1`
)

const (
	// large is a string of twenty million characters.
	large = `{{ $large := repeat 20000000 "x" }}`
	// cyclic are a map and a list that contain themselves.
	cyclic = `{{ $map := dict "a" 1 }}{{ $list := list $map }}{{ $_ := set $map "self" $map }}{{ $_ = set $map "list" $list }}`
)

// What takes memory takes more than the 128 MiB that a renderer may come to have, if all at once.
func hostileTemplates() []hostile {
	definitions := ""
	for i := range 20000 {
		definitions += fmt.Sprintf(`{{define "%d"}}x{{end}}`, i)
	}
	return []hostile{
		// Values that are too large
		{"until", `{{ range until (int .configurations.count) }}x{{ end }}`, takesMemory},
		{"until below zero", `{{ until -1000000000 }}`, takesMemory},
		{"untilStep", `{{ untilStep 0 2000000000 2 }}`, takesMemory},
		{"untilStep by nothing", `{{ len (untilStep 0 1 0) }}`, ""},
		{"seq", `{{ seq 1 1 1000000000 }}`, takesMemory},
		{"repeat", `{{ repeat 1000000000 "x" }}`, takesMemory},
		{"repeat beyond all numbers", `{{ repeat 9223372036854775807 "xx" }}`, failsPlain + `.* output length overflow$`},
		{"indent", `{{ indent 1000000000 "x" }}`, takesMemory},
		{"nindent of many lines", `{{ repeat 10000 "\n" | nindent 100000 }}`, takesMemory},
		{"randBytes", `{{ randBytes 1000000000 }}`, takesMemory},
		{"randAlphaNum", `{{ randAlphaNum 1000000000 }}`, takesEither},
		{"shuffle", large + `{{ shuffle (print $large $large $large) }}`, takesEither},
		{"printf with a huge width", `{{ printf "%1000000000d" 1 }}`, ""}, // fmt has a limit
		{"printf with many widths", `{{ printf (repeat 1000 "%1000000[1]d") 1 }}`, takesMemory},
		{"printf with a width of the Pod's", `{{ range 1000 }}{{ $.configurations.count | int | printf "%[1]*[1]d" }}{{ end }}`, ""},
		{"printf of one argument many times", `{{ printf (repeat 1000 "%[1]s") (repeat 1000000 "x") }}`, takesMemory},
		{"replace", `{{ replace "" (repeat 1000 "x") (repeat 1000000 "y") }}`, takesMemory},
		{"regexReplaceAll", `{{ regexReplaceAll "" (repeat 1000000 "x") (repeat 1000 "y") }}`, takesMemory},
		{"regexReplaceAll with repetitions", `{{ regexReplaceAll "(x{1,1000}){1,1000}" "x" "y" }}`, failsPlain + `.*invalid repeat count`},
		{"regexSplit", large + `{{ regexSplit "" $large -1 }}`, takesEither},
		{"mustRegexFindAll", large + `{{ mustRegexFindAll "" $large -1 }}`, takesEither},
		{"splitList", large + `{{ splitList "" $large }}`, takesMemory},
		{"split", large + `{{ split "x" $large }}`, takesEither},
		{"wrapWith", `{{ wrapWith 1 (repeat 1000 "x") (repeat 1000000 "y ") }}`, takesMemory},
		{"chunk", `{{ chunk 1 (until 3000000) }}`, takesEither},
		{"html", `{{ html (repeat 60000000 "<") }}`, takesMemory},
		{"toJson", `{{ toJson (repeat 60000000 "<") }}`, takesMemory},
		{"fromJson", `{{ $_ := fromJson (print "[" (repeat 3000000 "[],") "1]") }}`, takesEither},
		{"date", `{{ date (repeat 5000000 "Monday, 02 January 2006 15:04:05.000000000 ") now }}`, takesMemory},
		{"dateModify", `{{ now | dateModify "9223372036854775807h" | date "2006" | len }}`, ""},
		{"trunc", `{{ trunc -9223372036854775808 "x" }}`, ""},
		{"slice", `{{ slice (list 1 2) 1 9223372036854775807 }}`, failsPlain + `.*slice`},
		{"semver", `{{ semver (repeat 100000 "1") }}`, failsPlain},
		{"division by zero", `{{ div 1 0 }}`, failsPlain + `.*divide by zero`},
		{"a failure of a hundred million words", `{{ fail (repeat 100000000 "x ") }}`, takesMemory},
		{"a failure of a million lines", `{{ fail (repeat 1000000 "x\n") }}`, failsPlain + `, column 3, at <fail \(repeat 1000000 "x\\n"\)>: (x\n)+x? …$`},

		// Values that grow
		{"a list doubled", `{{ $l := list 1 }}{{ range 64 }}{{ $l = concat $l $l }}{{ end }}`, takesEither},
		{"a list appended", `{{ $l := list }}{{ range 100000000 }}{{ $l = append $l $l }}{{ end }}`, takesEither},
		{"a string doubled", `{{ $s := "x" }}{{ range 64 }}{{ $s = print $s $s }}{{ end }}`, takesMemory},
		{"cat and nindent", `{{ $s := "x" }}{{ range 64 }}{{ $s = cat $s $s | nindent 2 }}{{ end }}`, takesMemory},
		{"quote of quote", `{{ $s := "\"" }}{{ range 64 }}{{ $s = quote $s }}{{ end }}`, takesMemory},
		{"a map of many keys", `{{ $d := dict }}{{ range $i := 100000000 }}{{ $_ := set $d (toString $i) "" }}{{ end }}`, takesEither},
		{"deep JSON indented", `{{ $d := dict }}{{ range 9000 }}{{ $d = dict "k" $d }}{{ end }}{{ toPrettyJson $d | repeat 3 }}`, takesEither},
		{"a deep value copied", `{{ $d := dict }}{{ range 1000000 }}{{ $d = dict "k" $d }}{{ end }}{{ $_ := deepCopy $d }}`, takesEither},
		{"a shared value printed", `{{ $l := list "x" }}{{ range 40 }}{{ $l = list $l $l }}{{ end }}{{ toJson $l }}`, takesEither},

		// Values that contain themselves
		{"a cycle printed", cyclic + `{{ $map }}`, takesEither},
		{"a cyclic list printed", cyclic + `{{ $list }}`, takesEither},
		{"a cycle in printf", cyclic + `{{ printf "%v" $map }}`, takesEither},
		{"a cycle in Go's syntax", cyclic + `{{ printf "%#v" $list }}`, takesEither},
		{"a cycle quoted", cyclic + `{{ quote $map }}`, takesEither},
		{"a cycle copied", cyclic + `{{ $_ := deepCopy $map }}`, takesEither},
		{"a cycle merged", cyclic + `{{ $_ := merge (dict "self" (dict)) $map $map }}`, takesEither},
		{"a cycle in JSON", cyclic + `{{ mustToJson $map }}`, failsPlain + `.*encountered a cycle`},
		{"a cycle in the data", `{{ $_ := set .connector.spec "up" . }}{{ . }}`, takesEither},

		// Loops
		{"range over a number", `{{ range 9223372036854775807 }}{{ end }}`, takesTime},
		{"range that prints", `{{ range 9223372036854775807 }}x{{ end }}`, `: file "file": a volume may hold 1024 KiB in 256 files$`},
		{"calls that double", `{{ define "two" }}{{ if gt . 0 }}{{ template "two" (sub . 1) }}{{ template "two" (sub . 1) }}{{ end }}{{ end }}{{ template "two" 60 }}`, takesTime},
		{"a template that calls itself", `{{ template "file" . }}`, takesEither},
		{"a template that prints and calls itself", `{{ define "r" }}x{{ template "r" . }}{{ end }}{{ template "r" . }}`, takesEither},
		{"uniq", `{{ $_ := uniq (until 200000) }}`, takesTime},
		{"regexMatch", `{{ $s := repeat 100000 "x" }}{{ range 1000000 }}{{ $_ := regexMatch "(x+x+)+y" $s }}{{ end }}`, takesTime},
		{"sha512sum", `{{ $s := repeat 1000000 "x" }}{{ range 1000000 }}{{ $_ := sha512sum $s }}{{ end }}`, takesTime},
		{"derivePassword", `{{ range 1000 }}{{ $_ := derivePassword 1 "long" "password" "user" "example.com" }}{{ end }}`, takesEither},
		{"genPrivateKey", `{{ range 1000 }}{{ $_ := genPrivateKey "rsa" }}{{ end }}`, takesTime},
		{"htpasswd and bcrypt", `{{ range 1000 }}{{ $_ := htpasswd "user" "password" }}{{ $_ := bcrypt "password" }}{{ end }}`, takesTime},

		// Texts that are too much
		{"parentheses", `{{ ` + strings.Repeat("(", 1<<20), failsPlain + `: max expression depth exceeded$`},
		{"if in if", strings.Repeat("{{if 1}}", 100000) + strings.Repeat("{{end}}", 100000), takesEither},
		{"else if", "{{if 0}}" + strings.Repeat("{{else if 0}}", 120000) + "{{end}}", takesEither},
		{"actions", strings.Repeat("{{1}}", 200000), takesEither},
		{"beginnings of actions", strings.Repeat("{{", 1<<19), failsPlain},
		{"fields", `{{ .connector` + strings.Repeat(".a", 500000) + ` }}`, failsPlain},
		{"pipes", `{{ "x"` + strings.Repeat("|html", 100000) + ` }}`, ""},
		{"definitions", definitions + `{{ template "19999" }}`, ""},
		{"NUL, and what is not UTF-8", "\x00\xff{{ len .connector.name }}", ""},
	}
}

// Each of them is for a Pod of another namespace, since each has an account of processor time.
func TestHostileTemplates(t *testing.T) {
	n := newNode(t)
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns")
	t.Run("set", func(t *testing.T) {
		for i, h := range hostileTemplates() {
			t.Run(h.what, func(t *testing.T) {
				t.Parallel()
				name := fmt.Sprintf("hostile-%d", i)
				n.api.put(class(name, configuration("config", "file", h.template)), connector(name, "git", name))
				v := n.pod(name+"/default").volume("config", attrs{"configuration.params": `{"config":{"count":1000000000}}`})
				v.t = t
				if h.message == "" {
					v.mustPublish()
					v.mustUnpublish()
				} else {
					v.mustBeStopped(fmt.Sprintf(`^ConnectorClass %q, configuration "config"%s`, name, h.message))
				}
				next := n.pod("other/default").volume("config", attrs{"connector.namespace": "default"})
				next.t = t
				next.mustPublish()
				next.mustUnpublish()
			})
		}
	})
	p.wantSound(t)
}

// mustBeStopped publishes a volume that has to be refused for what it takes, with a message of this form.
func (v *podVolume) mustBeStopped(message string) {
	v.t.Helper()
	err := v.publish()
	for status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "the node is too busy") {
		err = v.publish() // as kubelet does
	}
	wantError(v.t, err, codes.FailedPrecondition)
	if text := status.Convert(err).Message(); !regexp.MustCompile(`(?s)` + message).MatchString(text) {
		v.t.Errorf("not %q, but %q", message, cut(text, 500))
	}
	v.wantNothing()
}

// wantSound makes sure that a driver has never had much memory, and leaves no process behind when it ends.
func (p *process) wantSound(t *testing.T) {
	t.Helper()
	if peak := kilobytes(t, p.Process.Pid, "VmHWM"); peak > 64<<10 {
		t.Errorf("the driver had %d KiB", peak)
	}
	left := children(t, p.Process.Pid)
	for pid, state := range left {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // nothing if it is a zombie
		if !strings.HasPrefix(string(text), driverName+"\x00"+serveArgument+"\x00") {
			t.Errorf("process %d is left in state %s: %q", pid, state, text)
		}
	}
	if len(left) > maxRenderers {
		t.Errorf("%d renderers: %v", len(left), left)
	}
	must(t, p.Process.Signal(syscall.SIGTERM))
	p.awaitExit(t)
	if code := p.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the driver ended with %d", code)
	}
	for pid := range left {
		awaitEnd(t, pid)
	}
}

// awaitEnd waits until a process has ended.
func awaitEnd(t testing.TB, pid int) {
	t.Helper()
	eventually(t, fmt.Sprintf("process %d has ended", pid), func() bool {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || bytes.Contains(text, []byte(") Z ")) // somebody else's, to wait for
	})
}

func TestHonestTemplatesThatAreSlow(t *testing.T) {
	n := startNode(t)
	for i, template := range []string{
		`{{ $key := genPrivateKey "rsa" }}{{ trunc 10 $key }}`, // 4096 bits
		`{{ $ca := genCA "ca" 365 }}{{ $ca.Cert }}`,
		`{{ $ca := genCA "ca" 365 }}{{ $cert := genSignedCert "a" nil (list "a.example.com") 365 $ca }}{{ $cert.Key }}`,
		`{{ derivePassword 1 "long" "password" "user" "example.com" }}`, // takes 32 MiB
		`{{ htpasswd "user" "password" }}{{ bcrypt "password" }}`,
		`{{ encryptAES "secretkey" "plaintext" | decryptAES "secretkey" }}`,
		`{{ range until 10000 }}{{ regexReplaceAll "([a-z]+)\\.([a-z]+)" "git.example" "${2}.${1}" }}{{ end }}`,
		`{{ range $i, $word := splitList " " (repeat 50000 "word ") }}{{ $i }}{{ end }}`,
		`{{ $d := dict }}{{ range $i := 10000 }}{{ $_ := set $d (toString $i) (list $i (dict "a" "b")) }}{{ end }}{{ toPrettyJson $d | fromJson | toPrettyJson }}`,
		`{{ repeat 1048576 "x" }}`,
	} {
		n.api.put(class("slow", configuration("config", "file", template)))
		namespace := fmt.Sprintf("slow-%d", i) // with an account of its own
		n.api.put(connector(namespace, "slow", "slow"))
		v := n.pod(namespace+"/default").volume("config", attrs{"connector.name": "slow"})
		err := v.publish()
		for err != nil && regexp.MustCompile("the node is too busy|takes more than 5s").MatchString(err.Error()) {
			err = v.publish()
		}
		if err != nil || v.file("file") == "" {
			t.Errorf("%s: %v", template, err)
		}
	}
}

// nested is a list in a list in a list, and so on.
func nested(depth int) json.RawMessage {
	return json.RawMessage(strings.Repeat("[", depth) + strings.Repeat("]", depth))
}

// manyLists has 1 MB and takes forty times as much while it is decoded.
var manyLists = with(json.RawMessage("["+strings.Repeat("[],", 350000)+"[]]"), "spec", "lists")

func TestHostileObjects(t *testing.T) {
	n := newNode(t)
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns")
	var files []string
	for i := range 10000 {
		files = append(files, fmt.Sprintf("file-%d", i), "x")
	}
	class := func(data ...string) object { return class("hostile", configuration("config", data...)) }
	for _, c := range []struct {
		what      string
		class     object
		connector func(object)
		params    string
		message   string // a regular expression; none: it does no harm
	}{
		{what: "10,000 files", class: class(files...), message: `^ConnectorClass "hostile", configuration "config": file "file-\d+": a volume may hold 1024 KiB in 256 files$`},
		{what: "a huge file name", class: class(strings.Repeat("x", 1<<20), "x"), message: `^ConnectorClass "hostile", configuration "config": file name "x+ …$`},
		{what: "a large class", class: func() object { c := class("file", "x"); manyLists(c); return c }()},
		{what: "a deep Connector", class: class("file", "x"), connector: with(nested(9000), "spec", "deep")},
		{what: "a deep Connector printed", class: class("file", "{{ toPrettyJson .connector }}"), connector: with(nested(9000), "spec", "deep"), message: takesEither},
		{what: "a large Connector", class: class("file", "x"), connector: manyLists},
		{what: "a larger Connector", class: class("file", "x"), connector: with(json.RawMessage("["+strings.Repeat("{},", 1000000)+"{}]"), "spec", "lists"),
			message: `^Connector "hostile-\d+/git": decoding it takes more than 64 MiB of memory$|` + takesEither},
		{what: "deep parameters", class: class("file", "{{ toPrettyJson .configurations.deep }}"), params: `{"deep":` + string(nested(9000)) + `}`, message: takesEither},
	} {
		t.Run(c.what, func(t *testing.T) {
			namespace := fmt.Sprintf("hostile-%d", serial.Add(1))
			o := connector(namespace, "git", "hostile")
			if c.connector != nil {
				c.connector(o)
			}
			n.api.put(c.class, o)
			v := n.pod(namespace+"/default").volume("config", attrs{"configuration.params": `{"config":` + cmp.Or(c.params, "{}") + `}`})
			v.t = t
			if c.message == "" {
				v.mustPublish()
			} else {
				v.mustBeStopped(c.message)
			}
		})
	}

	// The API server takes no deeper objects, and so does the driver.
	n.api.set(func() {
		n.api.objects[connectorPath("default", "git")] = []byte(`{"metadata":{"name":"git"},"spec":` + string(nested(20000)) + "}")
	})
	n.volume().mustRefuse(codes.Unavailable, `Connector "default/git" cannot be read: the answer is not a Kubernetes object`)

	// Sixteen at once, and then somebody else.
	n.api.put(class("file", "x"), connector("crowd", "git", "hostile", manyLists))
	errs := make(chan error)
	for i := range 16 {
		v := n.pod(fmt.Sprintf("crowd/default-%d", i)).volume("config")
		go func() { errs <- v.publish() }()
	}
	passed := 0
	for range 16 {
		if err := <-errs; err == nil {
			passed++
		} else if code := status.Code(err); code != codes.ResourceExhausted && code != codes.Unavailable {
			t.Error(err)
		}
	}
	if passed == 0 {
		t.Error("none of sixteen was mounted")
	}
	n.api.put(connector("default", "git", "hostile"))
	n.volume().mustPublish()
	p.wantSound(t)
}

// ---- What a renderer can do ----

const intruderKey = "CONNECTORS_CSI_TEST_INTRUDER"

// attempt is something that nobody shall be able to do in a renderer, and how it is refused.
type attempt struct {
	what    string
	refusal string // a regular expression
	try     func() error
}

// attempts are what code in a renderer may try, where something listens at the address outside.
func attempts(address string) []attempt {
	const none, readOnly, forbidden = "^no such file or directory$", "^read-only file system$", "^operation not permitted$"
	open := func(path string, flags int) func() error {
		return func() error {
			_, err := unix.Open(path, flags, 0o600)
			return err
		}
	}
	connect := func(family int, to unix.Sockaddr) func() error {
		return func() error {
			s, err := unix.Socket(family, unix.SOCK_STREAM, 0)
			if err != nil {
				return err
			}
			defer unix.Close(s)
			return unix.Connect(s, to)
		}
	}
	host := netip.MustParseAddrPort(address)
	// Go's own functions for these want all threads to do it.
	call := func(number uintptr, a ...uintptr) func() error {
		return func() error {
			if _, _, errno := unix.RawSyscall(number, a[0], a[1], a[2]); errno != 0 {
				return errno
			}
			return nil
		}
	}
	list := []attempt{
		{"read a file", none, open("/etc/passwd", unix.O_RDONLY)},
		{"read a file above the root", none, open("../../../../etc/passwd", unix.O_RDONLY)},
		{"read the driver's token", none, open(serviceAccountDir+"/token", unix.O_RDONLY)},
		{"read /proc", none, open("/proc/self/status", unix.O_RDONLY)},
		{"open the machine's memory", none, open("/dev/mem", unix.O_RDWR)},
		{"create a file", readOnly, open("/new", unix.O_CREAT|unix.O_WRONLY)},
		{"create a file without a name", readOnly, open("/", unix.O_TMPFILE|unix.O_RDWR)},
		{"create a directory", readOnly, func() error { return unix.Mkdir("/new", 0o700) }},
		{"create a device", readOnly, func() error { return unix.Mknod("/new", unix.S_IFCHR|0o600, 1<<8|1) }},
		{"see a file", "^there are 0$", func() error {
			if entries, err := os.ReadDir("/"); err != nil || len(entries) > 0 {
				return err
			}
			return errors.New("there are 0")
		}},
		{"write into a file that is memory", "^file too large$", func() error {
			file, err := unix.MemfdCreate("new", 0)
			if err != nil {
				return err
			}
			defer unix.Close(file)
			_, err = unix.Write(file, []byte("x"))
			return err
		}},
		{"connect to the API server", "^network is unreachable$", connect(unix.AF_INET, &unix.SockaddrInet4{Port: int(host.Port()), Addr: host.Addr().As4()})},
		{"connect to an abstract socket", "^connection refused$", connect(unix.AF_UNIX, &unix.SockaddrUnix{Name: "@" + address})},
		{"make a raw socket", forbidden, func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP); return err }},
		{"make a user namespace", forbidden, func() error {
			child, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
			if errno != 0 {
				return errno
			}
			if child == 0 {
				unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
			}
			return nil
		}},
		{"make a mount namespace", forbidden, func() error { return unix.Unshare(unix.CLONE_NEWNS) }},
		{"mount", forbidden, func() error { return unix.Mount("tmpfs", "/", "tmpfs", 0, "") }},
		{"make a filesystem", forbidden, func() error { _, err := unix.Fsopen("tmpfs", 0); return err }},
		{"unmount", forbidden, func() error { return unix.Unmount("/", unix.MNT_DETACH) }},
		{"change the root directory", forbidden, func() error { return unix.Chroot("/") }},
		// EINVAL: its user namespace has no other.
		{"become another user", forbidden + "|^invalid argument$", call(unix.SYS_SETRESUID, 12345, 12345, 12345)},
		{"become another group", forbidden + "|^invalid argument$", call(unix.SYS_SETRESGID, 12345, 12345, 12345)},
		{"leave its groups", forbidden, call(unix.SYS_SETGROUPS, 0, 0, 0)},
		{"gain a capability", forbidden, func() error {
			wanted := [2]unix.CapUserData{{Effective: 1 << unix.CAP_KILL, Permitted: 1 << unix.CAP_KILL}}
			return unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &wanted[0])
		}},
		{"set the host name", forbidden, func() error { return unix.Sethostname([]byte("x")) }},
		{"run a program", none, func() error { return unix.Exec("/bin/sh", []string{"sh"}, nil) }},
		{"run itself", none, func() error { return unix.Exec("/proc/self/exe", []string{"sh"}, nil) }},
		{"see its parent", "^0$", func() error { return isNumber(os.Getppid()) }},
		{"see another process", "^no such process$", func() error {
			for pid := 2; pid < 1<<15; pid++ {
				if _, err := unix.PidfdOpen(pid, 0); err == nil {
					return nil
				}
			}
			return unix.Kill(-1, 0)
		}},
		{"be in its parent's group", "^1$", func() error { return isNumber(unix.Getpgrp()) }},
		{"be more important", "^permission denied$", func() error { return unix.Setpriority(unix.PRIO_PROCESS, 0, 18) }},
		{"be looked into", "^0$", func() error {
			dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
			return cmp.Or(err, isNumber(dumpable))
		}},
		{"find something in the environment", "^GOMAXPROCS=1 GOMEMLIMIT=[0-9]+ GOTRACEBACK=none MALLOC_ARENA_MAX=1$", func() error {
			os.Unsetenv(intruderKey)
			variables := os.Environ()
			slices.Sort(variables)
			return errors.New(strings.Join(variables, " "))
		}},
		{"print something", "^bad file descriptor$", func() error { _, err := unix.Write(2, []byte("x")); return err }},
		{"find a descriptor", "^none$", func() error {
			for fd := 3; fd < 1024; fd++ {
				var stat unix.Stat_t
				// Those without a type are Go's own, and the pipe is this test's.
				if unix.Fstat(fd, &stat) == nil && stat.Mode&unix.S_IFMT != 0 && stat.Mode&unix.S_IFMT != unix.S_IFIFO {
					return fmt.Errorf("%d is of mode %o", fd, stat.Mode)
				}
			}
			return errors.New("none")
		}},
	}
	for name, resource := range sorted(map[string]int{"AS": unix.RLIMIT_AS, "DATA": unix.RLIMIT_DATA, "CPU": unix.RLIMIT_CPU, "FSIZE": unix.RLIMIT_FSIZE,
		"NOFILE": unix.RLIMIT_NOFILE, "CORE": unix.RLIMIT_CORE, "MEMLOCK": unix.RLIMIT_MEMLOCK}) {
		list = append(list, attempt{"raise RLIMIT_" + name, forbidden, func() error {
			var limit unix.Rlimit
			if err := unix.Getrlimit(resource, &limit); err != nil {
				return err
			}
			limit.Max++
			return unix.Setrlimit(resource, &limit)
		}})
	}
	return list
}

func isNumber(n int) error { return errors.New(strconv.Itoa(n)) }

// intrude makes all attempts in a renderer that is ready to work, and answers with their outcomes.
func intrude(address string) {
	signal.Ignore(unix.SIGXFSZ)
	outcomes := map[string]string{}
	for _, a := range attempts(address) {
		outcomes[a.what] = fmt.Sprint(a.try())
	}
	text, _ := json.Marshal(outcomes)
	writeFrame(os.Stdout, frameName, []byte("outcomes"))
	writeFrame(os.Stdout, frameContent, text)
	writeFrame(os.Stdout, frameDone, nil)
}

// renderedBy starts a node whose renderers are this program by another name.
func renderedBy(t *testing.T, name string) *node {
	t.Helper()
	link := filepath.Join(containerDir, name)
	must(t, os.Symlink(rendererBinary(), link))
	t.Cleanup(func() { os.Remove(link) })
	return startNode(t, func(d *driver) { d.renderers.binary = link })
}

// mayChooseUser reports whether the tests run as root of the machine, or as somebody who is alone in a user namespace.
func mayChooseUser(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/self/uid_map")
	must(t, err)
	return strings.Fields(string(text))[2] != "1"
}

func TestRendererCanDoNothing(t *testing.T) {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer server.Close()
	address := server.Addr().String()
	abstract, err := net.Listen("unix", "@"+address)
	must(t, err)
	defer abstract.Close()
	inherited, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0) // as whoever starts the driver may have it
	must(t, err)
	defer unix.Close(inherited)
	all := confinements
	t.Cleanup(func() { confinements = all })
	for i, c := range all {
		t.Run(fmt.Sprint(c.name, i), func(t *testing.T) {
			if c.flags == 0 {
				t.Skip("there it sees the node's files and processes, as any user of the node does")
			}
			if !mayChooseUser(t) && c.name != "same user" {
				t.Skip("only root may choose another user")
			}
			confinements = all[i : i+1]
			v := renderedBy(t, "intruder-"+address).volume()
			v.mustPublish()
			var outcomes map[string]string
			must(t, json.Unmarshal([]byte(v.file("outcomes")), &outcomes))
			for _, a := range attempts(address) {
				if !regexp.MustCompile(a.refusal).MatchString(outcomes[a.what]) {
					t.Errorf("%s: %q, not %q", a.what, outcomes[a.what], a.refusal)
				}
			}
		})
	}
}

// renderers returns the renderers of a driver inside the test process, which has no other children.
func (n *node) renderers() []int {
	n.t.Helper()
	return slices.Sorted(maps.Keys(children(n.t, os.Getpid())))
}

// What the kernel says of a renderer that is ready to work.
func TestRendererIsConfined(t *testing.T) {
	if mayChooseUser(t) {
		must(t, unix.Setgroups([]int{12345})) // as a Pod's supplementalGroups do
		t.Cleanup(func() { unix.Setgroups(nil) })
	}
	all := confinements
	t.Cleanup(func() { confinements = all })
	for i, c := range all {
		t.Run(fmt.Sprint(c.name, i), func(t *testing.T) {
			if !mayChooseUser(t) && (c.uid != os.Getuid() || c.name == "root") {
				t.Skip("only root may choose another user")
			}
			confinements = all[i : i+1]
			n := startNode(t)
			n.volume().mustPublish()
			pid := n.renderers()[0]
			uid := strconv.Itoa(c.uid)
			if c.flags&unix.CLONE_NEWUSER == 0 && mayChooseUser(t) {
				uid = strconv.Itoa(rendererUID)
			}
			for field, want := range sorted(map[string]string{
				"Uid": strings.TrimSuffix(strings.Repeat(uid+" ", 4), " "), "Gid": strings.TrimSuffix(strings.Repeat(uid+" ", 4), " "), "NoNewPrivs": "1",
				"CapInh": "0000000000000000", "CapPrm": "0000000000000000", "CapEff": "0000000000000000", "CapBnd": "0000000000000000", "CapAmb": "0000000000000000",
			}) {
				if got := processStatus(t, pid, field); got != want {
					t.Errorf("%s is %s, not %s", field, got, want)
				}
			}
			if groups := processStatus(t, pid, "Groups"); groups != "" && c.name != "same user" { // which may not leave them
				t.Errorf("it is in the groups %s", groups)
			}
			for name, flag := range sorted(map[string]uintptr{"user": unix.CLONE_NEWUSER, "mnt": unix.CLONE_NEWNS, "net": unix.CLONE_NEWNET, "pid": unix.CLONE_NEWPID, "ipc": unix.CLONE_NEWIPC}) {
				its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
				must(t, err)
				ours, err := os.Readlink("/proc/self/ns/" + name)
				must(t, err)
				if (its != ours) != (c.flags&flag != 0) {
					t.Errorf("its namespace %s is %s, and ours is %s", name, its, ours)
				}
			}
			limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
			must(t, err)
			for name, most := range sorted(map[string]int{
				"address space": kilobytes(t, pid, "VmSize")<<10 + 72<<20, "data size": kilobytes(t, pid, "VmData")<<10 + 72<<20,
				"cpu time": 60, "file size": 0, "open files": 16, "core file size": 0, "locked memory": 0,
			}) {
				match := regexp.MustCompile("Max " + name + ` +(\d+) +(\d+) `).FindStringSubmatch(string(limits))
				if match == nil {
					t.Errorf("the %s is not limited", name)
				} else if hard, _ := strconv.Atoi(match[2]); hard > most {
					t.Errorf("the limit of the %s is %d, more than %d", name, hard, most)
				}
			}
			if nice, err := unix.Getpriority(unix.PRIO_PROCESS, pid); nice != 1 || err != nil { // 20-nice, as the kernel has it
				t.Errorf("its priority is %d, %v", nice, err)
			}
			if score, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid)); string(score) != "1000\n" {
				t.Errorf("oom_score_adj is %q, %v", score, err)
			}
			said := strings.Contains(logs.String(), fmt.Sprintf("missing=%q", c.missing))
			if c.missing != "" && !said {
				t.Errorf("the log does not say that it lacks %s", c.missing)
			}
		})
	}
}

// ---- Renderers that die, and renderers that lie ----

// perhapsMounted are the codes after which kubelet takes care of a volume that may be mounted.
var perhapsMounted = []codes.Code{codes.Canceled, codes.DeadlineExceeded, codes.Unavailable, codes.ResourceExhausted, codes.Aborted}

func descriptors(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

func TestRenderersKilledAtAnyMoment(t *testing.T) {
	n := startNode(t)
	n.volume().mustPublish()
	n.driver.renderers.close()
	before, logged := descriptors(t), len(logs.String())
	var failed, ended atomic.Int32
	const volumes, rounds, wanted = 8, 8, 3 // rounds at least, until so many publishes have failed
	for i := range volumes {
		v := n.pod(fmt.Sprintf("team-%d/default", i%4)).volume("config", attrs{"connector.namespace": "default"})
		go func() {
			defer ended.Add(1)
			for round := 0; round < rounds || failed.Load() < wanted; round++ {
				v.pod.renewToken()
				err := v.publish()
				for ; err != nil; err = v.publish() {
					if failed.Add(1); !slices.Contains(perhapsMounted, status.Code(err)) {
						t.Error(err)
						return
					}
				}
				if text, err := os.ReadFile(v.target + "/token"); string(text) != v.pod.token {
					t.Errorf("the file is not the token: %v", err)
				}
			}
		}()
	}
	killed := 0
	for ended.Load() < volumes {
		for _, pid := range n.renderers() {
			// Not by its number, which may be another's by now.
			if p, err := os.FindProcess(pid); err == nil && children(t, os.Getpid())[pid] != "" && p.Kill() == nil {
				killed++
			}
		}
	}
	t.Logf("%d times killed, %d publishes failed", killed, failed.Load())
	// That one was killed is no sign that the kernel refuses to confine it as well as that.
	if strings.Contains(logs.String()[logged:], "less confined") && mayChooseUser(t) {
		t.Error("a renderer was less confined than it could be")
	}
	n.driver.renderers.close()
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	eventually(t, fmt.Sprintf("there are %d descriptors as before", before), func() bool { return descriptors(t) <= before })
}

func TestRenderersEndWithTheDriver(t *testing.T) {
	n := newNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}")), connector("default", "endless", "endless"))
	p := n.startBinary(rendererBinary())
	n.volume().mustPublish()
	idle := slices.Collect(maps.Keys(children(t, p.Process.Pid)))
	p.kill()
	awaitEnd(t, idle[0])

	p = n.startBinary(rendererBinary())
	done := make(chan error)
	go func() { done <- n.volume(attrs{"connector.name": "endless"}).publish() }()
	var busy []int
	eventually(t, "a renderer is at it", func() bool {
		busy = slices.Collect(maps.Keys(children(t, p.Process.Pid)))
		return len(busy) == 1 && processorTime(t, busy[0]) > 100*time.Millisecond
	})
	p.kill()
	wantError(t, <-done, codes.Unavailable)
	awaitEnd(t, busy[0])
}

// processorTime is what a process has used, which it may have ended after.
func processorTime(t testing.TB, pid int) time.Duration {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, err := strconv.Atoi(f[11])
	must(t, err)
	system, err := strconv.Atoi(f[12])
	must(t, err)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// impostor is a renderer that is not to be trusted.
type impostor struct {
	what    string
	code    codes.Code
	message string // a regular expression
	answer  func(token string, write func(kind byte, content string))
}

func impostors() []impostor {
	const huge = maxVolumeBytes
	type write = func(kind byte, content string)
	return []impostor{
		{"a frame of no kind", codes.Unavailable, `unexpected frame 'X'`, func(_ string, write write) { write('X', "") }},
		{"a frame that is too long", codes.Unavailable, `a frame of 1048577 bytes`, func(_ string, write write) { write(frameContent, strings.Repeat("x", huge+1)) }},
		{"300 files", codes.Unavailable, `a volume may hold 1024 KiB in 256 files`, func(_ string, write write) {
			for i := range 300 {
				write(frameName, fmt.Sprint(i))
				write(frameContent, "x")
			}
			write(frameDone, "")
		}},
		{"files of 2 MiB", codes.Unavailable, `a volume may hold 1024 KiB in 256 files`, func(_ string, write write) {
			for _, name := range []string{"a", "b"} {
				write(frameName, name)
				write(frameContent, strings.Repeat("x", huge))
			}
			write(frameDone, "")
		}},
		{"the name of a link", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameName, "..data")
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"a path", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameName, "a/b")
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"the token as a name", codes.Unavailable, `a file name that is not allowed`, func(token string, write write) {
			write(frameName, token+token)
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"a file without a name", codes.Unavailable, `a file name that is not allowed`, func(_ string, write write) {
			write(frameContent, "x")
			write(frameDone, "")
		}},
		{"the token many times", codes.FailedPrecondition, `^(TOKEN){20}$`, func(token string, write write) { write(frameFailure, strings.Repeat(token, 20)) }},
		{"the token in the Pod's error", codes.InvalidArgument, `^x TOKEN$`, func(token string, write write) { write(framePodFailure, "x "+token) }},
		{"the token in a step", codes.Unavailable, `the renderer ended .*; its last step was the TOKEN`, func(token string, _ write) {
			say("the " + token)
			os.Exit(0)
		}},
		{"a long step", codes.Unavailable, `the renderer ended .*; its last step was xxx.* …$`, func(string, write) {
			say(strings.Repeat("x", huge))
			os.Exit(0)
		}},
		{"no memory for steps", codes.Unavailable, `the renderer ended .*; its last step was $`, func(string, write) {
			unix.Ftruncate(stepsDescriptor, 0)
			os.Exit(0)
		}},
		{"what is not UTF-8", codes.FailedPrecondition, `^\?x\?$`, func(_ string, write write) { write(frameFailure, "\xffx\xff") }},
		{"half an answer", codes.Unavailable, `unexpected EOF`, func(_ string, write write) {
			write(frameName, "a")
			os.Stdout.Write([]byte{frameContent, 0, 0, 0, 9, 'x'})
			os.Exit(0)
		}},
		{"no answer", codes.Unavailable, `the node is too busy: nothing had .* of processor time in 5s`, func(string, write) { say("nothing") }},
		{"endless steps", codes.FailedPrecondition, `^on and on takes more than 5s$`, func(string, write) {
			for {
				say("on and on")
			}
		}},
		{"endless files", codes.FailedPrecondition, `^files takes more than 5s$`, func(_ string, write write) {
			say("files")
			for {
				write(frameName, "a")
				write(frameContent, "x")
			}
		}},
		{"no beginning", codes.Unavailable, `no renderer could be started: .*confining a renderer`, nil},
	}
}

// say says what a renderer is about to do.
func say(step string) { unix.Pwrite(stepsDescriptor, []byte(step+"\x00"), 0) }

// serve is what an impostor does in place of rendererMain.
func (i impostor) serve() (exitCode int) {
	write := func(kind byte, content string) {
		if writeFrame(os.Stdout, kind, []byte(content)) != nil {
			os.Exit(1)
		}
	}
	if i.answer == nil {
		write(frameName, "x")
		return 0
	}
	write(frameDone, "")
	_, header, _ := readFrame(os.Stdin, maxFrameBytes)
	var job jobHeader
	if json.Unmarshal(header, &job) != nil {
		return 1
	}
	i.answer(job.Token, write)
	io.Copy(io.Discard, os.Stdin) // it stays, until it is ended
	return 0
}

func TestRenderersThatCannotBeTrusted(t *testing.T) {
	var volumes []*podVolume
	for i := range impostors() {
		volumes = append(volumes, renderedBy(t, fmt.Sprintf("impostor-%d", i)).volume())
	}
	errs := make([]error, len(volumes))
	var wait sync.WaitGroup
	for i, v := range volumes {
		wait.Go(func() { errs[i] = v.publish() })
	}
	wait.Wait()
	for i, c := range impostors() {
		t.Run(c.what, func(t *testing.T) {
			v := volumes[i]
			v.t = t
			err := errs[i]
			if c.code == codes.FailedPrecondition && status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "the node is too busy") {
				t.Skip("the machine is too busy") // for it to take the time that it is refused for
			}
			wantError(t, err, c.code)
			if text := status.Convert(err).Message(); !regexp.MustCompile(c.message).MatchString(text) {
				t.Errorf("not %q, but %q", c.message, text)
			}
			v.wantNothing()
			// A failure is an answer, and no reason to end.
			p := v.node.driver.renderers
			if isAnswer := c.code == codes.InvalidArgument || strings.HasPrefix(c.message, "^") && !strings.Contains(c.message, "takes"); (len(p.idle) == 1) != isAnswer {
				t.Errorf("%d renderers go on", len(p.idle))
			}
			p.close()
		})
	}
	if left := children(t, os.Getpid()); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

// ---- Turns at the renderers ----

// change changes the state of the renderers, and lets in whom it lets in.
func changeRenderers(p *renderers, change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	p.admit()
}

// awaitTurns waits until so many calls wait for a renderer.
func awaitTurns(t *testing.T, p *renderers, count int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d wait for a renderer", count), func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.waiting) == count
	})
}

func TestFullestAccountIsNext(t *testing.T) {
	p := newRenderers("", nil)
	changeRenderers(p, func() {
		p.free = 0
		p.accounts["poor"] = &account{left: time.Second, at: time.Now()}
		p.accounts["rich"] = &account{left: 5 * time.Second, at: time.Now()}
		p.accounts["once-poor"] = &account{left: time.Second, at: time.Now().Add(-2 * time.Minute)} // 7 s by now
	})
	served := make(chan string)
	for i, who := range []string{"poor/1", "rich/1", "once-poor/1", "poor/2", "full/1", "rich/2", "full/2", "once-poor/2"} {
		go func() {
			namespace, _, _ := strings.Cut(who, "/")
			if err := p.wait(t.Context(), namespace); err != nil {
				t.Error(err)
			}
			served <- who
		}()
		awaitTurns(t, p, i+1)
	}
	for _, want := range []string{"full/1", "full/2", "once-poor/1", "once-poor/2", "rich/1", "rich/2", "poor/1", "poor/2"} {
		changeRenderers(p, func() { p.free++ })
		if got := <-served; got != want {
			t.Errorf("the next is %s, not %s", got, want)
		}
	}
}

// One namespace's templates have taken both renderers for a while, and more of them wait.
func TestOthersDoNotWaitForHostileVolumes(t *testing.T) {
	n := startNode(t)
	n.api.put(class("hostile", configuration("config", "file", `{{ fail "x" }}`)), connector("hostile", "git", "hostile"))
	p := n.driver.renderers
	changeRenderers(p, func() {
		p.free = 0
		p.accounts["hostile"] = &account{left: accountSize - 4*time.Second, at: time.Now()}
	})
	var wait sync.WaitGroup
	for i := range 10 {
		v := n.pod("hostile/default").volume("config")
		wait.Go(func() {
			wantError(t, v.publish(), codes.FailedPrecondition)
			p.mu.Lock()
			defer p.mu.Unlock()
			if slices.ContainsFunc(p.waiting, func(t *turn) bool { return t.namespace != "hostile" }) {
				t.Error("a hostile volume has had its turn while others wait")
			}
		})
		awaitTurns(t, p, i+1)
	}
	for i := range 30 {
		v := n.pod(fmt.Sprintf("honest-%d/default", i%3)).volume("config", attrs{"connector.namespace": "default"})
		wait.Go(func() {
			if err := v.publish(); err != nil {
				t.Error(err)
			}
		})
		awaitTurns(t, p, 10+i+1)
	}
	changeRenderers(p, func() { p.free = maxRenderers })
	wait.Wait()
}

func TestEmptyAccount(t *testing.T) {
	n := startNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}"), configuration("good", "file", "x")), connector("hungry", "git", "endless"))
	p := n.driver.renderers
	setAccount := func(left, ago time.Duration) {
		changeRenderers(p, func() {
			p.accounts["hungry"] = &account{left: left, at: time.Now().Add(-ago), most: left, mostBy: "nothing"}
		})
	}
	v := n.pod("hungry/default").volume("config")
	setAccount(time.Millisecond, 0)
	v.mustBeStopped(takesTime)

	// The next are refused at once, whatever they are.
	used := `^rendering for namespace "hungry" has used up its 10s of processor time, of which 3s come back each minute, enough for the next try in \d+s; ` +
		`what took most, [\d.]+m?s, is ConnectorClass "endless", configuration "config", file "file": rendering it$`
	good := n.pod("hungry/default").volume("config", attrs{"configuration.names": "good"})
	for _, v := range []*podVolume{v, good} {
		err := v.publish()
		wantError(t, err, codes.ResourceExhausted)
		if text := status.Convert(err).Message(); !regexp.MustCompile(used).MatchString(text) {
			t.Errorf("not %q, but %q", used, text)
		}
		v.wantNothing()
	}
	n.volume().mustPublish() // of another namespace

	// It fills up again, and is forgotten when it is full.
	setAccount(-time.Second, 21*time.Second)
	good.mustPublish()
	setAccount(-time.Second, time.Hour)
	n.volume().mustPublish()
	if p.accounts["hungry"] != nil {
		t.Error("a full account is not forgotten")
	}

	// It may become empty while somebody waits.
	changeRenderers(p, func() { p.free = 0 })
	done := make(chan error)
	go func() {
		done <- n.pod("hungry/default").volume("config", attrs{"configuration.names": "good"}).publish()
	}()
	awaitTurns(t, p, 1)
	setAccount(-time.Second, 0)
	wantError(t, <-done, codes.ResourceExhausted, "has used up")
	changeRenderers(p, func() { p.free = maxRenderers })
}

func TestRenderersAreUsedAgain(t *testing.T) {
	n := startNode(t)
	n.api.put(class("bad", configuration("config", "file", `{{ .none }}`)), connector("a", "git", "git"), connector("a", "bad", "bad"))
	publish := func(namespace string) (all []int) {
		t.Helper()
		n.pod(namespace+"/default").volume("config", attrs{"connector.namespace": "default"}).mustPublish()
		return n.renderers()
	}
	other := func(all []int, but int) int { return all[1-slices.Index(all, but)] }
	first := publish("a")
	if len(first) != 1 {
		t.Fatalf("renderers %v", first)
	}
	a := first[0]
	for range 3 {
		n.pod("a/default").volume("config", attrs{"connector.name": "bad"}).mustRefuse(codes.FailedPrecondition, "has no value")
		if again := publish("a"); !slices.Equal(again, first) {
			t.Errorf("for the same namespace, and after a failure, there is %v, not %v", again, first)
		}
	}
	two := publish("b")
	if len(two) != 2 || !slices.Contains(two, a) {
		t.Fatalf("for another namespace there are %v, not %d and one more", two, a)
	}
	b := other(two, a)
	if again := publish("a"); !slices.Equal(again, two) {
		t.Errorf("%v, not %v", again, two)
	}
	three := publish("c") // in the place of b, which is the longest idle
	if len(three) != 2 || !slices.Contains(three, a) || slices.Contains(three, b) {
		t.Fatalf("for a third namespace there are %v, not %d and another one than %d", three, a, b)
	}
	var all sync.WaitGroup
	for i := range 40 {
		v := n.pod(fmt.Sprintf("team-%d/default", i%5)).volume("config", attrs{"connector.namespace": "default"})
		all.Go(func() {
			if err := v.publish(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	p := n.driver.renderers
	if len(n.renderers()) != maxRenderers || len(p.idle) != maxRenderers || p.free != maxRenderers || len(p.waiting) != 0 {
		t.Errorf("renderers %v, idle %d, places %d, waiting %d", n.renderers(), len(p.idle), p.free, len(p.waiting))
	}
	for _, r := range slices.Clone(p.idle) {
		p.retire(r)
		p.retire(r) // by its timer, at the same moment
	}
	if left := n.renderers(); len(left) > 0 {
		t.Errorf("%v are left", left)
	}
	publish("a")
}

// A caller who gives up leaves its place in the line, or ends its renderer.
func TestCallersThatGiveUpRendering(t *testing.T) {
	n := startNode(t)
	n.api.put(class("endless", configuration("config", "file", "{{ range 9223372036854775807 }}{{ end }}")), connector("default", "endless", "endless"))
	p := n.driver.renderers
	publish := func() (giveUp func()) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		v := n.volume(attrs{"connector.name": "endless"})
		go func() {
			_, err := csi.NewNodeClient(n.conn).NodePublishVolume(ctx, v.request())
			done <- err
		}()
		return func() {
			t.Helper()
			cancel()
			wantError(t, <-done, codes.Canceled)
			n.awaitCalls(0)
			v.wantNothing()
		}
	}
	changeRenderers(p, func() { p.free = 0 })
	giveUp := publish()
	awaitTurns(t, p, 1)
	giveUp()
	awaitTurns(t, p, 0)
	changeRenderers(p, func() { p.free = maxRenderers })

	giveUp = publish()
	eventually(t, "a renderer is at it", func() bool { r := n.renderers(); return len(r) == 1 && processorTime(t, r[0]) > 0 })
	giveUp()
	if left := n.renderers(); len(left) > 0 || p.free != maxRenderers || p.accounts["default"] == nil {
		t.Errorf("renderers %v, places %d, accounts %v", left, p.free, p.accounts)
	}
	n.volume().mustPublish()
}

// ---- The mount ----

func TestMountIsReadOnly(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	m := mountsBelow(v.target)[0]
	if m.fstype != "tmpfs" || m.source != "connectors-csi" {
		t.Errorf("mounted is %+v", m)
	}
	for _, option := range []string{"ro", "nosuid", "nodev", "noexec"} {
		if !slices.Contains(strings.Split(m.options, ","), option) {
			t.Errorf("no %s in %s", option, m.options)
		}
	}
	for what, try := range sorted(map[string]func() error{
		"create":   func() error { return os.WriteFile(v.target+"/new", nil, 0o644) },
		"truncate": func() error { return os.Truncate(v.target+"/token", 0) },
		"remove":   func() error { return os.Remove(v.target + "/token") },
		"rename":   func() error { return os.Rename(v.target+"/token", v.target+"/other") },
		"chmod":    func() error { return os.Chmod(v.target+"/token", 0o777) },
	}) {
		if err := try(); !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v", what, err)
		}
	}
	v.wantClean()
}

func TestModes(t *testing.T) {
	n := startNode(t)
	gid := 0 // the only group there is in a user namespace of an ordinary user
	if text, err := os.ReadFile("/proc/self/gid_map"); err != nil || strings.Fields(string(text))[2] != "1" {
		gid = 2000
	}
	owner := func(path string) (fs.FileMode, int) {
		info, err := os.Stat(path)
		must(t, err)
		return info.Mode(), int(info.Sys().(*syscall.Stat_t).Gid)
	}
	v := n.volume()
	for _, step := range []struct {
		group     string
		dir, file fs.FileMode
		gid       int
	}{{"", 0o555, 0o444, 0}, {strconv.Itoa(gid), 0o550, 0o440, gid}} {
		v.change = group(step.group)
		v.settle()
		for _, path := range []string{"/..data", "/token", "/.gitconfig"} {
			want := step.file
			if path == "/..data" {
				want = fs.ModeDir | step.dir
			}
			if mode, gid := owner(v.target + path); mode != want || gid != step.gid {
				t.Errorf("group %q: %s has mode %v and group %d, not %v and %d", step.group, path, mode, gid, want, step.gid)
			}
		}
		other := n.volume()
		other.change = v.change
		other.mustPublish()
		if mode, gid := owner(other.target); mode != fs.ModeDir|step.dir || gid != step.gid {
			t.Errorf("group %q: the volume has mode %v and group %d", step.group, mode, gid)
		}
	}
}

func TestPublishTwiceIsOneMount(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	before := v.generation()
	for range 4 {
		v.mustPublish()
	}
	if v.generation() != before {
		t.Error("publishing again has written files")
	}
}

func TestOverlappingPublishes(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	gate := n.api.hold("/connectors/")
	results := make(chan error)
	for range 8 {
		go func() { results <- v.publish() }()
	}
	for range 7 { // all but the one that holds the target
		wantError(t, <-results, codes.Aborted, "another call", "kubelet will try again")
	}
	eventually(t, "it asks the API server", func() bool { return gate.waiting.Load() == 1 })
	wantError(t, v.unpublish(), codes.Aborted, "another call")
	gate.open()
	must(t, <-results)
	v.mustPublish()
	v.wantClean()
	v.mustUnpublish()
}

func TestPublishesOfDifferentTargetsRunInParallel(t *testing.T) {
	n := startNode(t)
	gate := n.api.hold("/connectors/")
	pod := n.pod()
	volumes := []*podVolume{pod.volume("a"), pod.volume("b"), n.volume()}
	results := publishAtOnce(volumes)
	eventually(t, "all have come to the API server", func() bool { return int(gate.waiting.Load()) == len(volumes) })
	gate.open()
	for range volumes {
		must(t, <-results)
	}
}

// At most 16 requests of Pods are under way, four of them for one namespace, and the driver's own have places beside them.
func TestRequestsAtOnceAreBounded(t *testing.T) {
	n := startNode(t)
	gate := n.api.hold("/connectors/")
	results := make(chan error)
	count := 0
	publish := func(serviceAccount string, volumes int) {
		t.Helper()
		for range volumes {
			go func(v *podVolume) { results <- v.publish() }(n.pod(serviceAccount).volume("config", attrs{"connector.namespace": "default"}))
		}
		count += volumes
		n.awaitCalls(count)
	}
	wantRequests := func(want int32) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d requests are under way", want), func() bool { return gate.waiting.Load() == want })
		if got := n.api.count(""); got != int(want) {
			t.Errorf("%d requests have come", got)
		}
	}
	publish("team-a/default", 40)
	wantRequests(4)
	publish("team-b/default", 5) // does not wait for team-a
	wantRequests(8)
	publish("team-c/default", 5)
	publish("team-d/default", 5)
	publish("team-e/default", 5)
	wantRequests(16)
	other := n.driver.kube.begin(podIdentity{namespace: "team-f"}, "", false)
	if _, err := other.class(t.Context(), "git"); err != nil {
		t.Errorf("the driver's own request waits for those of Pods: %v", err)
	}
	other.end()
	gate.open()
	for range count {
		must(t, <-results)
	}
	if k := n.driver.kube; len(k.namespaces) != 0 || k.held.bytes != 0 || len(k.places) != 0 {
		t.Errorf("nobody is at it, and yet: %v, %d, %d", k.namespaces, k.held.bytes, len(k.places))
	}
}

func TestConnectionIsReused(t *testing.T) {
	n := startNode(t)
	n.volume().settle()
	n.awaitWatches(2)
	connections := n.api.connections.Load()
	for range 10 {
		n.volume().mustPublish()
	}
	n.api.set(func() {
		if n.api.connections.Load() != connections || connections > 3 || !n.api.protocols["HTTP/2.0"] || len(n.api.protocols) != 1 {
			t.Errorf("%d connections, protocols %v", n.api.connections.Load(), n.api.protocols)
		}
	})
}

func TestUnpublish(t *testing.T) {
	n := startNode(t)
	mount := func(v *podVolume, fstype string) {
		t.Helper()
		must(t, unix.Mount(fstype, v.target, fstype, 0, ""))
	}

	v := n.volume()
	v.mustUnpublish() // of nothing
	v.mustPublish()
	v.mustUnpublish()
	v.mustUnpublish() // twice

	must(t, os.Mkdir(v.target, 0o750)) // left by a killed process, or after a reboot
	v.mustUnpublish()

	v.mustPublish()
	mount(v, "tmpfs") // somebody stacked two mounts on it
	mount(v, "tmpfs")
	v.mustUnpublish()

	v.mustPublish()
	inside, err := os.Open(v.target) // somebody stands in it
	must(t, err)
	defer inside.Close()
	v.mustUnpublish()

	must(t, os.Mkdir(v.target, 0o750)) // not the driver's
	must(t, os.WriteFile(v.target+"/precious", nil, 0o644))
	wantError(t, v.unpublish(), codes.FailedPrecondition, "holds something that connectors-csi did not mount")
	if _, err := os.Stat(v.target + "/precious"); err != nil {
		t.Error(err)
	}

	gone := n.volume()
	must(t, os.RemoveAll(n.podsDir()+"/"+gone.pod.uid)) // kubelet has cleaned up already
	gone.mustUnpublish()
	if n.api.count(classPath("git")) != 3 {
		t.Error("unpublishing has asked the API server")
	}
}

func TestLeftoverDirectoryIsUsed(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	must(t, os.Mkdir(v.target, 0o750)) // of a process that was killed between mkdir and mount
	v.mustPublish()
	v.wantClean()
	v.mustUnpublish()
}

func TestForeignMountIsLeftAlone(t *testing.T) {
	for _, kind := range []string{"ramfs", "tmpfs"} {
		t.Run(kind, func(t *testing.T) {
			n := startNode(t)
			v := n.volume()
			must(t, os.Mkdir(v.target, 0o755))
			must(t, unix.Mount("foreign", v.target, kind, 0, ""))
			must(t, os.WriteFile(v.target+"/precious", nil, 0o644))
			wantError(t, v.publish(), codes.FailedPrecondition, "did not mount", v.target, "look at it on the node")
			entries, err := os.ReadDir(v.target)
			if err != nil || len(entries) != 1 || entries[0].Name() != "precious" || len(mountsBelow(v.target)) != 1 {
				t.Error("it was touched:", err, entries, mountsBelow(v.target))
			}
		})
	}
}

func TestFileAtTargetIsLeftAlone(t *testing.T) {
	n := startNode(t)
	other := n.volume()
	other.mustPublish()
	for what, put := range sorted(map[string]func(target string) error{
		"a file": func(target string) error { return os.WriteFile(target, []byte("precious"), 0o644) },
		"a link": func(target string) error { return os.Symlink(other.target, target) },
	}) {
		t.Run(what, func(t *testing.T) {
			v := n.volume()
			must(t, put(v.target))
			wantError(t, v.publish(), codes.FailedPrecondition, "did not mount")
			wantError(t, v.unpublish(), codes.FailedPrecondition, "did not mount")
			if _, err := os.Lstat(v.target); err != nil {
				t.Error("it was touched:", err)
			}
		})
	}
	other.want("token", other.pod.token)
}

func TestMissingParentIsNotCreated(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	must(t, os.RemoveAll(n.podsDir()+"/"+v.pod.uid))
	v.mustRefuse(codes.Internal, "no such file or directory")
}

// A container sees the volume by a mount of its own, which it keeps for its lifetime.
func TestChangesReachRunningContainers(t *testing.T) {
	n := startPolling(t)
	n.api.put(class("git", configuration("config", "address", "{{ .connector.spec.address }}", "old", "x")))
	v := n.volume()
	v.mustPublish()
	container := startContainer(t, v)
	directory, err := os.Open(container)
	must(t, err)
	defer directory.Close()

	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	n.api.put(class("git", configuration("config", "address", "{{ .connector.spec.address }}", "new", "y")))
	v.mustPublish()
	v.want("address", "https://git.example.com") // within the refresh interval
	n.age()
	v.mustPublish()
	v.wantClean()
	v.wantFiles("address", "new")
	for _, path := range []string{container, fmt.Sprintf("/proc/self/fd/%d", directory.Fd())} {
		if text, err := os.ReadFile(path + "/address"); string(text) != "https://changed" {
			t.Errorf("%s: %q, %v", path, text, err)
		}
		if _, err := os.Lstat(path + "/old"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s/old: %v", path, err)
		}
		if text, err := os.ReadFile(path + "/new"); string(text) != "y" {
			t.Errorf("%s/new: %q, %v", path, text, err)
		}
		if err := os.WriteFile(path+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("the container may write: %v", err)
		}
	}
	v.mustPublish() // and nobody reads the old files any more
	if generations, _ := filepath.Glob(container + "/..gen-*"); len(generations) != 1 {
		t.Errorf("generations %v", generations)
	}
}

// startContainer mounts the volume as a container runtime does: recursively, private, read-only.
func startContainer(t testing.TB, v *podVolume) string {
	dir := fmt.Sprintf("%s/%d", containerDir, serial.Add(1))
	must(t, os.Mkdir(dir, 0o755))
	must(t, unix.Mount(v.target, dir, "", unix.MS_BIND|unix.MS_REC, ""))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, unix.Mount("", dir, "", unix.MS_PRIVATE|unix.MS_REC, ""))
	must(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""))
	return dir
}

func TestFailedRepublishKeepsTheFiles(t *testing.T) {
	n := startPolling(t)
	v := n.volume()
	v.mustPublish()
	before, files := v.generation(), v.read()
	for what, fail := range sorted(map[string]func(){
		"API server":    func() { n.api.answer("/connectors/", 500, "") },
		"Connector":     func() { n.api.remove(connectorPath("default", "git")) },
		"template":      func() { n.api.put(class("git", configuration("config", "token", "{{ .connector.spec.none }}"))) },
		"configuration": func() { n.api.put(class("git", configuration("other"))) },
		"too large":     func() { n.api.put(class("git", configuration("config", "token", `{{ repeat 1048577 "x" }}`))) },
	}) {
		n.api.answer("", 0, "")
		n.api.put(gitClass(), connector("default", "git", "git"))
		fail()
		n.age()
		if err := v.publish(); err == nil {
			t.Errorf("%s: it was published", what)
		}
		if !maps.Equal(v.read(), files) || v.generation() != before {
			t.Errorf("%s: the files changed", what)
		}
		v.wantClean()
	}
	n.api.answer("", 0, "")
	n.api.put(gitClass(), connector("default", "git", "git", with("https://repaired", "spec", "address")))
	n.age()
	v.mustPublish()
	if !strings.Contains(v.file(".gitconfig"), "https://repaired") {
		t.Error("it was not repaired")
	}
}

func TestInterruptedUpdatesAreCompleted(t *testing.T) {
	n := startPolling(t)
	next := files{"token": []byte("next"), "mark": []byte("next"), "more": []byte("next")}
	half := generationPrefix + digest(next, access{})
	for what, interrupt := range sorted(map[string]func(dir string) error{
		"link not renamed":       func(dir string) error { return os.Symlink("..gen-x", dir+"/..data_tmp") },
		"directory of that name": func(dir string) error { return os.MkdirAll(dir+"/..data_tmp/x", 0o755) },
		"old generation":         func(dir string) error { return os.CopyFS(dir+"/..gen-0123", os.DirFS(dir+"/..data/")) },
		"half-written generation": func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/"+half, 0o700), os.WriteFile(dir+"/"+half+"/token", []byte("ne"), 0o400))
		},
		"generation with more in it": func(dir string) error {
			return errors.Join(os.Mkdir(dir+"/"+half, 0o700), os.WriteFile(dir+"/"+half+"/stray", []byte("x"), 0o400))
		},
		"link without its file":   func(dir string) error { return os.Symlink("..data/more", dir+"/more") },
		"old link":                func(dir string) error { return os.Symlink("..data/gone", dir+"/gone") },
		"file without its link":   func(dir string) error { return os.Remove(dir + "/token") },
		"no current generation":   func(dir string) error { return os.Remove(dir + "/..data") },
		"generation that is gone": func(dir string) error { return os.RemoveAll(dir + "/..data/") },
		"current link leads astray": func(dir string) error {
			return errors.Join(os.Remove(dir+"/..data"), os.Symlink("..gen-none", dir+"/..data"))
		},
	}) {
		t.Run(what, func(t *testing.T) {
			n.api.put(gitClass())
			n.age()
			v := n.volume()
			v.t = t
			v.settle()
			must(t, interrupt(v.writable()))
			n.api.put(class("git", configuration("config", "token", "next", "mark", "next", "more", "next")))
			n.age()
			v.mustPublish()
			v.wantClean()
			v.wantFiles("mark", "more", "token")
			v.want("token", "next")
		})
	}
}

func TestMountWithoutFilesIsCompleted(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.settle()
	dir := v.writable()
	must(t, os.Remove(dir+"/..data"))
	v.mustPublish() // nothing else has changed
	v.wantClean()
	v.want("token", v.pod.token)
}

func TestFullVolume(t *testing.T) {
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	files := v.read()
	filler := v.writable() + "/..filler" // as one of the driver's own; another name would make the mount somebody else's
	file, err := os.Create(filler)
	must(t, err)
	if _, err := io.Copy(file, zeros{}); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("the volume is not limited: %v", err)
	}
	must(t, file.Close())

	_, err = publishVolume(v.target, map[string][]byte{"token": []byte("new")}, access{})
	wantError(t, mountStatus(err), codes.ResourceExhausted, "no room", "no space left on device")
	if !maps.Equal(v.read(), files) {
		t.Error("the files changed")
	}
	if generations, _ := filepath.Glob(v.target + "/..gen-*"); len(generations) != 1 {
		t.Errorf("generations %v", generations)
	}
	v.pod.renewToken()
	wantError(t, v.publish(), codes.ResourceExhausted, "KiB of memory") // and not even tried

	must(t, os.Truncate(filler, 0))
	v.mustPublish()
	v.wantClean()
	v.want("token", v.pod.token)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// During 1,000 updates readers never see a file missing, a part of the files, or files of two generations, and
// nobody can write. The files of a generation stay until the next but one comes, so a reader that is kept from
// running for two updates, which take milliseconds here and a minute or more in a cluster, has to begin again.
func TestReadersDuringUpdates(t *testing.T) {
	n := startPolling(t)
	names := []string{"a", "b", "c", "d"}
	v := n.volume()
	publish := func(i int) {
		data := []string{}
		for _, name := range names {
			data = append(data, name, fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 5000)))
		}
		n.api.put(class("git", configuration("config", data...)))
		n.age()
		v.mustPublish()
	}
	publish(0)
	container := startContainer(t, v)
	stop, result, reads := make(chan struct{}), make(chan error, 1), 0
	var begun, done atomic.Int64 // updates
	go func() {
		for {
			select {
			case <-stop:
				result <- nil
				return
			default:
			}
			current := done.Load()
			err := cmp.Or(readNames(container, names), readGeneration(container, names))
			if errors.Is(err, fs.ErrNotExist) && begun.Load() >= current+2 {
				continue
			}
			if writeErr := os.WriteFile(container+"/x", nil, 0o644); !errors.Is(writeErr, unix.EROFS) {
				err = fmt.Errorf("the container may write: %v", writeErr)
			}
			if err != nil {
				result <- err
				return
			}
			reads++
		}
	}()
	for i := 1; i <= 1000 && len(result) == 0; i++ {
		begun.Add(1)
		publish(i)
		done.Add(1)
	}
	close(stop)
	if err := <-result; err != nil {
		t.Error(err)
	}
	v.wantClean()
	if reads < 100 {
		t.Errorf("only %d reads", reads)
	}
}

// readNames reads every file by its visible name: each is there and complete.
func readNames(dir string, names []string) error {
	for _, name := range names {
		text, err := os.ReadFile(dir + "/" + name)
		if err != nil {
			return fmt.Errorf("missing: %w", err)
		}
		if _, err := generationOf(string(text)); err != nil {
			return err
		}
	}
	return nil
}

// readGeneration reads all files of one generation, which is removed when the next but one comes.
func readGeneration(dir string, names []string) error {
	root, err := os.OpenRoot(dir + "/..data")
	if err != nil {
		return fmt.Errorf("missing: %w", err)
	}
	defer root.Close()
	seen := -1
	for _, name := range names {
		text, err := root.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			if entries, err := fs.ReadDir(root.FS(), "."); err == nil && len(entries) == len(names) {
				return fmt.Errorf("%s is missing among %v", name, entries)
			}
			return nil // this generation is being removed
		}
		if err != nil {
			return err
		}
		number, err := generationOf(string(text))
		if err != nil {
			return err
		}
		if seen >= 0 && number != seen {
			return fmt.Errorf("generation %d has a file of %d", seen, number)
		}
		seen = number
	}
	return nil
}

func generationOf(text string) (int, error) {
	first, rest, _ := strings.Cut(text, "\n")
	number, err := strconv.Atoi(first)
	if err != nil || rest != strings.Repeat("x", 5000) {
		return 0, fmt.Errorf("a part of a file: %d bytes, %w", len(text), err)
	}
	return number, nil
}

// ---- Memory of volumes ----

// sized is a class whose configuration "config" has the token in one file and so many bytes in another.
func sized(bytes int) object {
	return class("git", configuration("config", "token", "{{ .context.token }}", "large", fmt.Sprintf(`{{ repeat %d "x" }}`, bytes)))
}

// used is what all volumes of the node take, by the driver's metrics.
func (n *node) used() int64 {
	n.t.Helper()
	return int64(n.readMetrics()["connectors_csi_volumes_bytes"])
}

// The driver's figure for files that are to be mounted is the one for the volume that holds them.
func TestMemoryIsKnownBeforeTheMount(t *testing.T) {
	n := newNode(t)
	target := n.volume().target
	many := files{}
	for i := range 256 {
		many[strconv.Itoa(i)] = nil
	}
	for what, f := range sorted(map[string]files{
		"none":            {},
		"empty":           {"a": nil},
		"a byte":          {"a": []byte("x")},
		"a page":          {"a": make([]byte, os.Getpagesize())},
		"a byte more":     {"a": make([]byte, os.Getpagesize()+1)},
		"long link":       {strings.Repeat("a", 120): nil},
		"longer link":     {strings.Repeat("a", 121): nil},
		"longest link":    {strings.Repeat("a", 253): []byte("x")},
		"256 empty files": many,
		"large":           {"a": make([]byte, 1<<20), "b": []byte("x")},
	}) {
		must(t, mountVolume(target, f, access{}))
		if need, used := f.memory(), memoryOf(target); need != used {
			t.Errorf("%s: %d bytes, but it takes %d", what, need, used)
		}
		_, err := unpublishVolume(target)
		must(t, err)
	}
}

// The memory that the kernel charges to the driver for volumes of 256 empty files, which have no blocks, is within
// what the driver counts, and at least half of it.
func TestMemoryIsWhatTheKernelCharges(t *testing.T) {
	cgroup, usage := fmt.Sprintf("/sys/fs/cgroup/memory/connectors-csi-test-%d", os.Getpid()), "/memory.usage_in_bytes"
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		cgroup, usage = fmt.Sprintf("/sys/fs/cgroup/connectors-csi-test-%d", os.Getpid()), "/memory.current"
		if err := os.Mkdir(cgroup, 0o755); err != nil {
			t.Skip("no cgroup can be made: ", err)
		}
	}
	defer func() { eventually(t, "the cgroup is removed", func() bool { return os.Remove(cgroup) == nil }) }()
	if _, err := os.Stat(cgroup + usage); err != nil {
		t.Skip("the cgroup does not count memory: ", err)
	}
	n := newNode(t)
	var data []string
	for i := range 256 {
		data = append(data, fmt.Sprint("file-", i), "")
	}
	n.api.put(class("git", configuration("config", data...)))
	p := n.startProcess()
	defer p.kill()
	must(t, os.WriteFile(cgroup+"/cgroup.procs", []byte(strconv.Itoa(p.Process.Pid)), 0o644))
	// charged is what the cgroup is charged for, less the process's own memory
	charged := func() int64 {
		text, err := os.ReadFile(cgroup + usage)
		must(t, err)
		bytes, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		must(t, err)
		text, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
		must(t, err)
		own, err := strconv.ParseInt(regexp.MustCompile(`RssAnon:\s+(\d+) kB`).FindStringSubmatch(string(text))[1], 10, 64)
		must(t, err)
		return bytes - own<<10
	}
	for range 20 {
		n.volume().mustPublish()
	}
	before, usedBefore := charged(), n.used()
	for range 100 {
		must(t, n.volume().publish())
	}
	got, counted := charged()-before, n.used()-usedBefore
	t.Logf("%d KiB are charged for a volume, and %d KiB counted", got/100>>10, counted/100>>10)
	if got > counted || got < counted/2 {
		t.Errorf("%d KiB are charged, and %d KiB counted", got>>10, counted>>10)
	}
}

func TestPodMayHave16Volumes(t *testing.T) {
	n := startNode(t)
	pod := n.pod()
	var volumes []*podVolume
	for i := range 17 {
		volumes = append(volumes, pod.volume(fmt.Sprint("v", i)))
	}
	for _, v := range volumes[:16] {
		v.mustPublish()
	}
	volumes[16].mustRefuse(codes.ResourceExhausted, "16 other volumes of connectors-csi", "may have 16")
	n.volume().mustPublish() // of another Pod
	volumes[3].mustUnpublish()
	volumes[16].mustPublish()
	volumes[3].mustRefuse(codes.ResourceExhausted)
	volumes[5].pod.renewToken()
	volumes[5].mustPublish()
}

func TestPodsVolumesHaveALimitTogether(t *testing.T) {
	n := startPolling(t)
	n.api.put(sized(980 << 10))
	pod := n.pod()
	first, second, third := pod.volume("first"), pod.volume("second"), pod.volume("third")
	first.mustPublish()
	second.mustPublish()
	third.mustRefuse(codes.ResourceExhausted, "takes 1014 KiB of memory", "other volumes take 2029 KiB", "may take 2048 KiB")
	n.volume().mustPublish() // of another Pod

	// Files may be replaced by as many, which leaves no room for the old ones beside them.
	pod.renewToken()
	first.mustPublish()
	first.want("token", pod.token)
	if generations, _ := filepath.Glob(first.target + "/..gen-*"); len(generations) != 1 {
		t.Errorf("generations %v", generations)
	}

	// They may not grow beyond the limit, and stay as they were.
	files := second.read()
	n.api.put(sized(1010 << 10))
	n.age()
	wantError(t, second.publish(), codes.ResourceExhausted, "takes 1046 KiB of memory", "other volumes take 1014 KiB")
	if !maps.Equal(second.read(), files) {
		t.Error("the files changed")
	}
	second.wantClean()
	n.api.put(sized(100 << 10))
	n.age()
	second.mustPublish()
	third.mustPublish()
}

// Volumes of one Pod that are published at once do not pass the limit together.
func TestPodsVolumesAtOnce(t *testing.T) {
	n := startNode(t)
	n.api.put(sized(500 << 10))
	pod := n.pod()
	results := make(chan error)
	for i := range 16 {
		v := pod.volume(fmt.Sprint("v", i))
		go func() { results <- v.publish() }()
	}
	published := 0
	for range 16 {
		if err := <-results; err == nil {
			published++
		} else {
			wantError(t, err, codes.ResourceExhausted, "other volumes take")
		}
	}
	if published != 3 || len(mountsBelow(n.podsDir())) != 3 {
		t.Errorf("%d volumes of 534 KiB are published, and %d mounted, of at most 2 MiB", published, len(mountsBelow(n.podsDir())))
	}
}

// The node's budget: 1 MiB here, and volumes of 334.5 KiB.
func TestNodesBudget(t *testing.T) {
	n := newNode(t)
	n.api.noWatch = true
	n.api.put(sized(300 << 10))
	p := n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
	volumes := []*podVolume{n.volume(), n.volume(), n.volume()}
	for _, v := range volumes {
		v.mustPublish()
	}
	v, refused := volumes[0], n.volume()
	words := []string{"takes 334 KiB of memory", "other volumes take 1003 KiB", "may take 1024 KiB", "raise --volumes-budget"}
	refused.mustRefuse(codes.ResourceExhausted, words...)
	if got := n.readMetrics(); got["connectors_csi_volumes_bytes"] != 3*334.5*1024 || got["connectors_csi_volumes_budget_bytes"] != 1<<20 || got["connectors_csi_volumes"] != 3 {
		t.Errorf("metrics %v", got)
	}

	// Tokens go on, even all at once.
	for _, v := range volumes {
		v.pod.renewToken()
	}
	results := publishAtOnce(volumes)
	for range volumes {
		must(t, <-results)
	}
	for _, v := range volumes {
		v.wantClean()
		v.want("token", v.pod.token)
	}

	// What grows beyond the budget is refused, and what grows within it is not.
	files := v.read()
	n.api.put(sized(324 << 10))
	wantError(t, v.publish(), codes.ResourceExhausted, "takes 358 KiB of memory", "other volumes take 669 KiB", "--volumes-budget")
	if !maps.Equal(v.read(), files) {
		t.Error("the files changed")
	}
	v.wantClean()
	n.api.put(sized(316 << 10))
	v.mustPublish()
	n.api.put(sized(300 << 10))
	v.mustPublish()

	// A driver that is started again knows the volumes, and not the subPath mounts.
	subPath := filepath.Join(n.podsDir(), v.pod.uid, "volume-subpaths/config/client/0")
	must(t, os.MkdirAll(subPath, 0o750))
	must(t, unix.Mount(v.target, subPath, "", unix.MS_BIND, ""))
	used := n.used()
	p.kill()
	n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 3 || n.used() != used {
		t.Errorf("after a restart there are %v volumes of %d bytes, and not 3 of %d", got, n.used(), used)
	}
	refused.mustRefuse(codes.ResourceExhausted, words...)
	volumes[1].mustUnpublish()
	refused.mustPublish()
}

// What an older driver has mounted beyond the limits is refreshed, by this one and the next.
func TestVolumesBeyondTheLimitsGoOn(t *testing.T) {
	n := newNode(t)
	n.api.put(sized(300 << 10))
	pod := n.pod()
	var volumes []*podVolume
	for i := range 20 {
		v := pod.volume(fmt.Sprint("v", i))
		must(t, mountVolume(v.target, files{"token": []byte(pod.token), "large": bytes.Repeat([]byte("x"), 300<<10)}, access{}))
		volumes = append(volumes, v)
	}
	for range 2 {
		p := n.startBinary(rendererBinary(), "--refresh-interval=1ns", "--volumes-budget=1")
		for range 2 {
			pod.renewToken()
			for _, v := range volumes {
				v.mustPublish()
				v.want("token", pod.token)
			}
		}
		pod.volume("more").mustRefuse(codes.ResourceExhausted, "20 other volumes")
		n.volume().mustRefuse(codes.ResourceExhausted, "--volumes-budget")
		p.kill()
	}
	n.startProcess()
	for _, v := range volumes {
		v.mustUnpublish()
	}
	if used := n.used(); used != 0 {
		t.Errorf("%d bytes of no volumes", used)
	}
}

// A Pod that keeps old files open gets new ones until it is beyond its limit, and again when it has closed them. Here
// are two volumes of 1014 KiB each, so that there is room for no other.
func TestOldFilesThatAreOpenCount(t *testing.T) {
	n := startNode(t)
	n.api.put(sized(980 << 10))
	pod := n.pod()
	volumes := []*podVolume{pod.volume("first"), pod.volume("second")}
	var open []*os.File
	for _, v := range volumes {
		v.mustPublish()
		file, err := os.Open(v.target + "/large")
		must(t, err)
		open = append(open, file)
	}
	used := n.used()
	pod.renewToken()
	results := publishAtOnce(volumes)
	err := errors.Join(<-results, <-results) // one of them
	wantError(t, err, codes.ResourceExhausted)
	if err == nil || !strings.Contains(err.Error(), "983 KiB of it for old files that its containers have open or mount by subPath") {
		t.Errorf("no figures in: %v", err)
	}
	if got := memoryOf(volumes[0].target) + memoryOf(volumes[1].target); got > 3<<20 || n.used() != got {
		t.Errorf("%d KiB are held, and %d counted", got>>10, n.used()>>10)
	}
	for _, v := range volumes {
		v.wantClean()
	}
	for _, file := range open {
		file.Close()
	}
	for _, v := range volumes {
		v.publish() // sees that they are closed
	}
	for _, v := range volumes {
		v.mustPublish()
		v.want("token", pod.token)
	}
	if n.used() != used {
		t.Errorf("%d KiB are counted, and not %d", n.used()>>10, used>>10)
	}
}

// Failed publishes take nothing, and neither does a volume that somebody has unmounted.
func TestBudgetIsGivenBack(t *testing.T) {
	n := startNode(t)
	v, failing := n.volume(), n.volume()
	must(t, os.RemoveAll(filepath.Dir(failing.target)))
	failing.mustRefuse(codes.Internal)
	if used := n.used(); used != 0 {
		t.Errorf("a volume that is not mounted takes %d bytes", used)
	}
	v.mustPublish()
	used := n.used()
	n.driver.budget.forgetUnmounted()
	if used == 0 || n.used() != used {
		t.Errorf("a mounted volume takes %d bytes, and then %d", used, n.used())
	}
	must(t, unix.Unmount(v.target, unix.MNT_DETACH))
	n.driver.budget.forgetUnmounted()
	if used := n.used(); used != 0 {
		t.Errorf("a volume that somebody has unmounted takes %d bytes", used)
	}
	v.mustPublish()
	if n.used() != used {
		t.Errorf("mounted again it takes %d bytes, and not %d", n.used(), used)
	}

	// One that is just being mounted is not forgotten.
	next := n.volume()
	_, err := n.driver.budget.reserve(next.target, 1<<20)
	must(t, err)
	n.driver.budget.forgetUnmounted()
	if n.used() != used+1<<20 {
		t.Errorf("%d bytes are set aside", n.used()-used)
	}
}

// A scrape reads no list of mounts, so that no number of scrapers keeps a publish waiting. Here whoever opens the list
// waits for ever.
func TestMetricsDoNotReadMounts(t *testing.T) {
	n := newNode(t)
	p := n.startProcess()
	fifo := t.TempDir() + "/mountinfo"
	must(t, unix.Mkfifo(fifo, 0o600))
	list := fmt.Sprintf("/proc/%d/mountinfo", p.Process.Pid)
	must(t, unix.Mount(fifo, list, "", unix.MS_BIND, ""))
	defer unix.Unmount(list, unix.MNT_DETACH)
	scrapes := make(chan error)
	for range 64 {
		go func() {
			client := http.Client{Timeout: 20 * time.Second}
			response, err := client.Get("http://" + n.http + "/metrics")
			if err == nil {
				_, err = io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
			scrapes <- err
		}()
	}
	must(t, n.volume().publishWithin(20*time.Second))
	for range 64 {
		must(t, <-scrapes)
	}
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 1 {
		t.Errorf("%v volumes", got)
	}
}

// A line of the list of mounts may be longer than 64 KiB, since a path may; all that comes after it is read as well.
func TestLongMountLine(t *testing.T) {
	n := newNode(t)
	dir, err := unix.Open(t.TempDir(), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range 70 { // each space is written in four characters
		name := strings.Repeat(" ", 255)
		must(t, unix.Mkdirat(dir, name, 0o755))
		next, err := unix.Openat(dir, name, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		unix.Close(dir)
		dir = next
	}
	mount, err := newTmpfs(access{})
	must(t, err)
	must(t, unix.MoveMount(mount, "", dir, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH))
	unix.Close(dir)
	defer unix.Close(mount)
	defer unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", mount), unix.MNT_DETACH)
	text, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if !slices.ContainsFunc(strings.Split(string(text), "\n"), func(line string) bool { return len(line) > 64<<10 }) {
		t.Fatal("there is no such line")
	}

	target := n.volume().target
	must(t, mountVolume(target, files{"a": nil}, access{}))
	mounts, err := readMounts()
	must(t, err)
	if !slices.ContainsFunc(mounts, func(m mountInfo) bool { return m.point == target && m.source == mountSource && m.shared }) {
		t.Error("a mount after the long line is missing")
	}
	if !slices.ContainsFunc(mounts, func(m mountInfo) bool { return strings.HasSuffix(m.point, strings.Repeat(" ", 255)) }) {
		t.Error("the mount of the long line is missing")
	}
	n.startProcess()
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 1 {
		t.Errorf("%v volumes", got)
	}
}

// ---- Killed and started again ----

func TestKilledBeforeTheMount(t *testing.T) {
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	gate := n.api.hold("/connectors/")
	result := make(chan error)
	go func() { result <- v.publish() }()
	eventually(t, "the publish is under way", func() bool { return gate.waiting.Load() == 1 })
	p.kill()
	wantError(t, <-result, codes.Unavailable)
	v.wantNothing()
	gate.open()
	n.startProcess() // replaces the socket that is left
	v.mustPublish()
	v.wantClean()
}

func TestKilledDuringUpdates(t *testing.T) {
	n := newNode(t)
	names := []string{"a", "b", "c", "d", "e", "f"}
	change := func(i int) {
		data := []string{}
		for _, name := range names[:1+i%len(names)] {
			data = append(data, name, fmt.Sprintf("%d\n%s", i, strings.Repeat("x", 5000)))
		}
		n.api.put(class("git", configuration("config", data...)))
	}
	change(0)
	v := n.volume()
	published := 0
	for round := range 12 {
		p := n.startProcess()
		v.mustPublish()
		v.wantClean()
		updating := make(chan struct{})
		go func() {
			defer close(updating)
			for err := error(nil); err == nil; published++ {
				change(published)
				err = v.publish()
			}
		}()
		time.Sleep(time.Duration(round) * 3 / 2 * time.Millisecond) // another moment each time
		p.kill()
		<-updating
		if text := v.file("a"); len(text) < 5000 {
			t.Fatalf("round %d: after the kill a file has %d bytes", round, len(text))
		}
	}
	n.startProcess()
	v.mustPublish()
	v.wantClean()
	generation, err := generationOf(v.file("a"))
	must(t, err)
	v.wantFiles(names[:1+generation%len(names)]...)
	for name, text := range v.read() {
		if got, err := generationOf(text); got != generation {
			t.Errorf("%s is of generation %d, not %d (%v)", name, got, generation, err)
		}
	}
	v.mustUnpublish()
}

func TestRestartKeepsVolumes(t *testing.T) {
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	v.mustPublish()
	container := startContainer(t, v)
	before := v.generation()
	p.kill()
	v.want("token", v.pod.token)
	n.startProcess()
	v.mustPublish()
	v.wantClean()
	if v.generation() != before {
		t.Error("the first republish has written what was there already")
	}
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	v.mustPublish()
	if text, err := os.ReadFile(container + "/.gitconfig"); !strings.Contains(string(text), "https://changed") {
		t.Errorf("the container sees %q, %v", text, err)
	}
	v.mustUnpublish()
}

// ---- Random input ----

func FuzzAttributes(f *testing.F) {
	f.Add("git", "default", "", "config", "", "30m", "", "")
	f.Add("", "", "a,team-a/b", "one, two,!file", `{"one":{"p":"v"}}`, "1h30m", "csi.storage.k8s.io/ephemeral", "true")
	f.Add("../x", "a%2fb", ",,/", "!", "null", "1ns", "configuration.name", "x")
	f.Add("a.b", "-", "a//b", " , ", `{"":{}}`, "9223372036854775807ns", "", "\x00")
	f.Fuzz(func(t *testing.T, name, namespace, connectors, configurations, params, expiration, key, value string) {
		dns := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
		for _, builtIn := range []bool{false, true} {
			sent := attrs{"connector.name": name, "connector.namespace": namespace, "connectors": connectors, "configuration.names": configurations,
				"configuration.params": params, "token.expiration": expiration, key: value}
			a, err := parseAttributes(sent, "default", builtIn)
			if err == nil {
				err = a.check()
			}
			if err != nil {
				if len(err.Error()) > 2000 {
					t.Errorf("the message has %d bytes", len(err.Error()))
				}
				continue
			}
			if len(a.connectors) == 0 || len(a.selection.configurations) == 0 && !builtIn || len(a.connectors) > 32 ||
				len(a.selection.configurations) > 64 || len(a.selection.excluded) > 64 {
				t.Errorf("accepted: %+v", a)
			}
			if a.lifetime < 10*time.Minute || a.lifetime > 24*time.Hour || a.lifetime == 3607*time.Second || a.lifetime%time.Second != 0 {
				t.Errorf("accepted: %v", a.lifetime)
			}
			for _, r := range a.connectors {
				if !dns.MatchString(r.name) || !dns.MatchString(r.namespace) || len(r.name) > 253 || len(r.namespace) > 63 || strings.Contains(r.namespace, ".") {
					t.Errorf("accepted: %q", r)
				}
			}
			for i, c := range a.selection.configurations {
				if len(c) > 253 || slices.Contains(a.selection.configurations[:i], c) {
					t.Errorf("accepted: %q", a.selection.configurations)
				}
				if c == "" || c != strings.TrimSpace(c) || strings.ContainsAny(c[:1], "!") || strings.Contains(c, ",") {
					t.Errorf("accepted: %q", c)
				}
			}
			for c, text := range a.selection.params {
				if value, err := decodeJSON(text); !slices.Contains(a.selection.configurations, c) || err != nil || kindOf(value) != "object" {
					t.Errorf("params of %q: %s", c, text)
				}
			}
		}
	})
}

func FuzzFileName(f *testing.F) {
	for _, name := range []string{"a", ".gitconfig", "..data", ".", "..", "a/b", "a\x00", "ü", strings.Repeat("a", 254)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if checkFileName(name) != nil {
			return
		}
		if name != filepath.Base(name) || name == "." || strings.HasPrefix(name, "..") || len(name) > 253 || !filepath.IsLocal(name) ||
			strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == '\\' }) {
			t.Errorf("accepted: %q", name)
		}
	})
}

func FuzzRender(f *testing.F) {
	for _, text := range []string{
		"plain", "{{ .connector.spec.address }}", "{{ .context.token }}", "{{ fail .context.token }}", "{{ range .connectors }}{{ .x }}{{ end }}", "{{ print .none }}",
		"{{ define \"a\" }}{{ . }}{{ end }}{{ template \"a\" .connector.spec }}", "{{ with $x := .connector.spec.list }}{{ index $x 0 | toJson }}{{ else }}{{ . }}{{ end }}",
		"{{ .connector.spec.none | default .context | toString | b64enc }}", "{{ if and .a (or .b .connector) }}{{ get .connector \"x\" }}{{ end }}", npmrc,
	} {
		f.Add(text, `{"spec":{"address":"https://example.com","list":[1,null,{"a":1.5}]}}`)
	}
	f.Add("{{ .connector.spec }}", `{"spec":"no value","metadata":[],"status":{"proxy":1}}`)
	// Functions that are slow, whose result may be as long as a number says, or that can make a value hold itself: only a
	// renderer survives those.
	slow := regexp.MustCompile(`(?i)[0-9]{4}|0x|[0-9]e|gen[A-Z]|rand|bcrypt|htpasswd|derive|repeat|until|seq|indent|printf|wrap|AES|set|merge`)
	token := issue("default", "default", nil, time.Hour, apiAudience)
	f.Fuzz(func(t *testing.T, text, data string) {
		value, err := decodeJSON([]byte(data))
		o, ok := value.(object)
		if err != nil || !ok || slow.MatchString(text) || strings.Contains(text+data, "no value") {
			return
		}
		mounted := []mountedConnector{{o, class("class", configuration("config", "file", text))}}
		before, _ := json.Marshal(o)
		for _, builtIn := range []bool{false, true} {
			files, err := render(mounted, selection{configurations: []string{"config"}, builtIn: builtIn}, token, func(string) {})
			if err != nil {
				if secret := secretIn(err.Error()); secret != "" {
					t.Errorf("the error contains %s", secret)
				}
				continue
			}
			size := 0
			for name, content := range files {
				size += len(content)
				if checkFileName(name) != nil || strings.Contains(string(content), "<no value>") {
					t.Errorf("%s: %q", name, content)
				}
			}
			if size > 1<<20 || len(files) > 256 {
				t.Errorf("%d files of %d bytes", len(files), size)
			}
		}
		if after, _ := json.Marshal(o); !bytes.Equal(before, after) {
			t.Errorf("the object was changed: %s", after)
		}
	})
}

// What the driver reads of an object is what templates see of it.
func FuzzParseObject(f *testing.F) {
	for _, o := range []object{connector("team-a", "git", "git"), gitClass(), connector("a", "b", "c", with("http://x", "status", "proxy", "httpAddress", "audience")), {}} {
		text, _ := json.Marshal(o)
		f.Add(string(text))
	}
	f.Add(" {\n\"metadata\" : {\"n\\u0061me\" : \"a\\\"\\u00e4\\\\\" ,\t\"uid\":\"\\\\\"} , \"spec\":{ \"x\" : [ 1 , -2.5e3 , true,null,{ } , [ ] ], \"connectorClassName\":\"git\" } }\r\n")
	f.Add(`{"metadata":{"name":["x"],"uid":{"name":"y"}},"Metadata":{"name":"z"},"spec":[{"connectorClassName":"a"}],"status":{"proxy":"x","PROXY":{}}}`)
	f.Fuzz(func(t *testing.T, text string) {
		value, err := decodeJSON([]byte(text))
		decoded, ok := value.(object)
		if err != nil || !ok {
			if _, err := parseObject([]byte(text)); err == nil && value != nil {
				t.Errorf("%s is taken for an object", text)
			}
			return
		}
		raw, err := json.Marshal(decoded) // each name once, as the API server sends it
		must(t, err)
		o, err := parseObject(raw)
		must(t, err)
		if want := contentVersion(stringAt(decoded, "metadata", "uid"), stringAt(decoded, "metadata", "resourceVersion")); o.version != want {
			t.Errorf("%s: the version is %q, not %q", raw, o.version, want)
		}
		for _, field := range []struct {
			got  string
			path []string
		}{
			{o.namespace, []string{"metadata", "namespace"}}, {o.name, []string{"metadata", "name"}}, {o.class, []string{"spec", "connectorClassName"}},
			{o.classAudience, []string{"spec", "proxy", "audience"}}, {o.proxyAddress, []string{"status", "proxyAddress"}},
			{o.proxyURL, []string{"status", "proxy", "httpAddress", "url"}}, {o.proxyAudience, []string{"status", "proxy", "httpAddress", "audience"}},
		} {
			if want := stringAt(decoded, field.path...); field.got != want {
				t.Errorf("%s: %v is %q, not %q", raw, field.path, field.got, want)
			}
		}
	})
}

func FuzzRegistrationStatus(f *testing.F) {
	f.Add([]byte{8, 1})
	f.Add([]byte{8, 0, 18, 2, 'n', 'o'})
	f.Add([]byte{18, 2, 'n'})
	f.Add([]byte{18, 200, 1})
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Add([]byte{26, 1, 'x', 8, 1, 32, 7})
	f.Fuzz(func(t *testing.T, data []byte) {
		registered, message, err := parseRegistrationStatus(data)
		if err != nil && (registered || message != "") || len(message) > len(data) {
			t.Errorf("%x: %v, %q, %v", data, registered, message, err)
		}
		// What is put before it does not change what it says, unless it is malformed.
		r, m, e := parseRegistrationStatus(append([]byte{8, 0, 18, 0}, data...))
		if r != registered || m != message || (e == nil) != (err == nil) {
			t.Errorf("%x: %v, %q, %v", data, r, m, e)
		}
	})
}

// ---- Figures: go test -run '^$' -bench . ----

// BenchmarkPublish publishes and unpublishes one volume.
func BenchmarkPublish(b *testing.B) {
	n := startNode(b)
	benchmarkPublish(n.volume())
}

func benchmarkPublish(v *podVolume) {
	b := v.t.(*testing.B)
	must(b, v.publish())
	must(b, v.unpublish())
	request := v.request()
	client := csi.NewNodeClient(v.node.conn)
	unpublish := &csi.NodeUnpublishVolumeRequest{VolumeId: request.VolumeId, TargetPath: v.target}
	for b.Loop() {
		_, err := client.NodePublishVolume(b.Context(), request)
		must(b, err)
		_, err = client.NodeUnpublishVolume(b.Context(), unpublish)
		must(b, err)
	}
}

// BenchmarkPublishFloor is what BenchmarkPublish cannot do without: the same two requests to the API server, and
// the same system calls, bare.
func BenchmarkPublishFloor(b *testing.B) { benchmarkFloor(b, func(csi.IdentityClient) {}) }

// BenchmarkPublishFloorWithCalls is the same with two empty calls, as kubelet makes two to publish and unpublish.
func BenchmarkPublishFloorWithCalls(b *testing.B) {
	benchmarkFloor(b, func(client csi.IdentityClient) {
		_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
		must(b, err)
	})
}

func benchmarkFloor(b *testing.B, call func(csi.IdentityClient)) {
	n := startNode(b)
	identity := csi.NewIdentityClient(n.conn)
	v := n.volume()
	v.mustPublish()
	contents := v.read()
	v.mustUnpublish()
	client, own := n.driver.kube.client, driverToken()
	get := func(path, token string) {
		request, err := http.NewRequestWithContext(b.Context(), http.MethodGet, n.api.URL+path, nil)
		must(b, err)
		request.Header.Set("Authorization", "Bearer "+token)
		response, err := client.Do(request)
		must(b, err)
		_, err = io.ReadAll(response.Body)
		must(b, err)
		response.Body.Close()
	}
	for b.Loop() {
		get(connectorPath("default", "git"), v.pod.token)
		get(classPath("git"), own)
		mountBare(b, v.target, contents)
		call(identity)
		must(b, unix.Unmount(v.target, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH))
		must(b, unix.Rmdir(v.target))
		call(identity)
	}
}

// mountBare mounts the files at the target path by nothing but system calls.
func mountBare(b *testing.B, target string, contents map[string]string) {
	conf, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	must(b, err)
	for _, option := range [][2]string{{"source", "connectors-csi"}, {"mode", "555"}, {"size", "6291456"}, {"nr_inodes", "1032"}} {
		must(b, unix.FsconfigSetString(conf, option[0], option[1]))
	}
	unix.FsconfigSetFlag(conf, "noswap")
	must(b, unix.FsconfigCreate(conf))
	mount, err := unix.Fsmount(conf, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	must(b, err)
	unix.Close(conf)
	must(b, unix.Mkdirat(mount, "..gen", 0o755))
	generation, err := unix.Openat(mount, "..gen", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(b, err)
	for name, content := range contents {
		file, err := unix.Openat(generation, name, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o400)
		must(b, err)
		_, err = unix.Write(file, []byte(content))
		must(b, err)
		must(b, unix.Fchmod(file, 0o444))
		unix.Close(file)
		must(b, unix.Symlinkat("..data/"+name, mount, name))
	}
	unix.Close(generation)
	must(b, unix.Symlinkat("..gen", mount, "..data_tmp"))
	must(b, unix.Renameat(mount, "..data_tmp", mount, "..data"))
	must(b, unix.MountSetattr(mount, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
	must(b, unix.Mkdir(target, 0o750))
	must(b, unix.MoveMount(mount, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
	unix.Close(mount)
}

// BenchmarkProbe is an empty call over the same socket.
func BenchmarkProbe(b *testing.B) {
	n := startNode(b)
	client := csi.NewIdentityClient(n.conn)
	_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
	must(b, err)
	for b.Loop() {
		_, err := client.Probe(b.Context(), &csi.ProbeRequest{})
		must(b, err)
	}
}

func BenchmarkRepublishUnchanged(b *testing.B) {
	n := startNode(b)
	v := n.volume()
	v.mustPublish()
	asked := n.api.count("")
	request, client := v.request(), csi.NewNodeClient(n.conn)
	for b.Loop() {
		_, err := client.NodePublishVolume(b.Context(), request)
		must(b, err)
	}
	if n.api.count("") != asked {
		b.Error("the API server was asked")
	}
}

func BenchmarkRepublishNewToken(b *testing.B) {
	n := startNode(b)
	v := n.volume()
	v.mustPublish()
	requests := []*csi.NodePublishVolumeRequest{v.request()}
	v.pod.renewToken()
	requests = append(requests, v.request())
	client, i := csi.NewNodeClient(n.conn), 0
	for b.Loop() {
		i++
		_, err := client.NodePublishVolume(b.Context(), requests[i%2])
		must(b, err)
	}
}

func BenchmarkRender(b *testing.B) {
	mounted := []mountedConnector{{connector("default", "git", "git"), gitClass()}}
	token := issue("default", "default", nil, time.Hour, apiAudience)
	for b.Loop() {
		_, err := render(mounted, selection{configurations: []string{"config"}}, token, func(string) {})
		must(b, err)
	}
}

// BenchmarkRenderInRenderer is BenchmarkRender in a renderer that runs already.
func BenchmarkRenderInRenderer(b *testing.B) {
	n := startNode(b)
	n.volume().mustPublish()
	j := benchmarkJob(b)
	for b.Loop() {
		_, err := n.driver.renderers.render(b.Context(), "default", j)
		must(b, err)
	}
}

// BenchmarkRenderInNewRenderer is the same with one that has to be started, as for the first volume in a while.
func BenchmarkRenderInNewRenderer(b *testing.B) {
	n := startNode(b)
	j := benchmarkJob(b)
	for b.Loop() {
		n.driver.renderers.close()
		clear(n.driver.renderers.accounts) // for more than ten seconds of processor time
		_, err := n.driver.renderers.render(b.Context(), "default", j)
		must(b, err)
	}
}

func benchmarkJob(b *testing.B) job {
	var objects []*apiObject
	for _, o := range []object{connector("default", "git", "git"), gitClass()} {
		text, err := json.Marshal(o)
		must(b, err)
		parsed, err := parseObject(text)
		must(b, err)
		objects = append(objects, parsed)
	}
	token := issue("default", "default", nil, time.Hour, apiAudience)
	return job{[]source{{objects[0], objects[1]}}, selection{configurations: []string{"config"}}, token}
}

// BenchmarkPublishWith1000Volumes is BenchmarkPublish on a node that has 1,000 volumes already.
func BenchmarkPublishWith1000Volumes(b *testing.B) {
	n := startNode(b)
	for range 1000 {
		must(b, n.volume().publish())
	}
	benchmarkPublish(n.volume())
}

// releasedBinary builds the driver as it is released.
func releasedBinary(b *testing.B) string {
	binary := filepath.Join(b.TempDir(), "connectors-csi")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	return binary
}

// BenchmarkProcess is BenchmarkPublish with the driver as it is released: a static binary in a process of its own. It
// reports its resident memory, and its share (Pss) of that of the process and its renderers: after kubelet has
// registered it, after all the publishes, and when the renderers have ended.
func BenchmarkProcess(b *testing.B) {
	n := newNode(b)
	p := n.startBinary(releasedBinary(b))
	n.callRegistration("GetInfo", nil)
	n.callRegistration("NotifyRegistrationStatus", []byte{8, 1})
	n.wantReady(200, "ok")
	share := func() (megabytes float64) {
		for _, pid := range append(slices.Collect(maps.Keys(children(b, p.Process.Pid))), p.Process.Pid) {
			text, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
			must(b, err)
			kilobytes, err := strconv.ParseFloat(regexp.MustCompile(`Pss: +(\d+) kB`).FindStringSubmatch(string(text))[1], 64)
			must(b, err)
			megabytes += kilobytes * 1024 / 1e6
		}
		return megabytes
	}
	resident := func() float64 { return float64(kilobytes(b, p.Process.Pid, "VmRSS")) * 1024 / 1e6 }
	idle, idleShare := resident(), share()
	benchmarkPublish(n.volume())
	b.ReportMetric(idle, "MB-idle")
	b.ReportMetric(resident(), "MB-after")
	b.ReportMetric(idleShare, "MB-idle-share")
	b.ReportMetric(share(), "MB-after-share")
	eventually(b, "the renderers have ended", func() bool { return len(children(b, p.Process.Pid)) == 0 })
	b.ReportMetric(share(), "MB-alone-share")
}

// BenchmarkPush is from the change of a Connector to the file of a volume.
func BenchmarkPush(b *testing.B) {
	n := startNode(b)
	var took []time.Duration
	for b.Loop() {
		b.StopTimer()
		v := n.volume() // one that was just pushed would wait a second
		v.settle()
		n.awaitWatches(2)
		address := fmt.Sprintf("https://change-%d.example.com", len(took))
		b.StartTimer()
		began := time.Now()
		n.api.put(connector("default", "git", "git", with(address, "spec", "address")))
		for !strings.Contains(v.file(".gitconfig"), address) {
		}
		took = append(took, time.Since(began))
		b.StopTimer()
		v.mustUnpublish()
		b.StartTimer()
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkStreams reports what 100 open streams take of the resident memory of the driver as it is released: the same
// 252 Connectors are mounted by the Pods of four namespaces, and by those of one, which may have 64 streams.
func BenchmarkStreams(b *testing.B) {
	var more []float64
	binary := releasedBinary(b)
	resident := func(namespaces, streams int) float64 {
		n := newNode(b)
		n.api.put(class("git", configuration("config", "file", "x")))
		p := n.startBinary(binary)
		defer p.kill()
		var volumes []*podVolume
		for i := range 12 {
			var names []string
			for j := range 21 {
				name := fmt.Sprintf("c-%d", 21*i+j)
				names = append(names, "default/"+name)
				n.api.put(connector("default", name, "git"))
			}
			pod := n.pod(fmt.Sprintf("team-%d/default", i%namespaces))
			volumes = append(volumes, pod.volume("config", attrs{"connector.name": "-", "connectors": strings.Join(names, ",")}))
		}
		for range 10 {
			for _, v := range volumes {
				v.pod.renewToken()
				v.mustPublish()
			}
		}
		n.awaitWatches(streams)
		eventually(b, "the renderers have ended", func() bool { return len(children(b, p.Process.Pid)) == 0 })
		return float64(kilobytes(b, p.Process.Pid, "VmRSS")) / 1024
	}
	for b.Loop() {
		watched := resident(4, 252+1) // with the class
		more = append(more, (watched-resident(1, 64))*100/(253-64))
	}
	slices.Sort(more)
	b.ReportMetric(more[len(more)/2], "MiB-per-100")
}

// ---- The module ----

func TestDirectDependencies(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	must(t, err)
	var direct []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "\t") && !strings.Contains(line, "// indirect") {
			direct = append(direct, f[0])
		}
	}
	if want := []string{"github.com/Masterminds/sprig/v3", "github.com/container-storage-interface/spec", "golang.org/x/sys", "google.golang.org/grpc"}; !slices.Equal(direct, want) {
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
	case roleTests:
		if err := setUpNamespace(); err != nil {
			fmt.Fprintln(os.Stderr, "setting up the mount namespace:", err)
			os.Exit(1)
		}
		os.Setenv(roleKey, roleWorker)
		slog.SetDefault(slog.New(slog.NewTextHandler(&logs, nil)))
		code := m.Run()
		if secret := secretIn(logs.String()); secret != "" {
			fmt.Printf("--- FAIL: the log of all tests contains %s\n", secret)
			code = 1
		}
		os.Exit(code)
	case roleWorker:
		slog.SetDefault(slog.New(slog.NewTextHandler(&logs, nil)))
		m.Run()
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
			fmt.Fprintln(os.Stderr, "the tests mount volumes: run them as root, or allow user namespaces (sysctl user.max_user_namespaces):", err)
			return 1
		}
	}
	cmd.Wait()
	return cmd.ProcessState.ExitCode()
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
	// Every API server of httptest has the same certificate.
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(filepath.Join(serviceAccountDir, "ca.crt"), ca, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(serviceAccountDir, "token"), []byte(driverToken()+"\n"), 0o600)
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

// logs is all that any driver has logged, in this process or in one of its own, in any test.
var logs lockedBuffer

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

// Tokens are JSON Web Tokens as the API server issues them: header.payload.signature. All of them begin alike and
// have the same mark in their signature, so that a search for a few strings finds any part of any token.

var tokenHeader = base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"HS256","kid":"the-key-of-the-test-cluster"}`))

const signatureMark = "this-is-a-signature:" // followed by the real one

// fileMark is in files of the test's classes and nowhere else.
const fileMark = "written-into-files-only"

type claims struct {
	Audience   []string `json:"aud"`
	Expires    int64    `json:"exp"`
	Kubernetes struct {
		Namespace      string            `json:"namespace"`
		Pod            map[string]string `json:"pod,omitempty"`
		ServiceAccount map[string]string `json:"serviceaccount"`
	} `json:"kubernetes.io"`
	Subject string `json:"sub"`
	Serial  int64  `json:"jti"`
}

var serial atomic.Int64

func sign(payload string) string {
	h := hmac.New(sha256.New, []byte("key"))
	io.WriteString(h, payload)
	return base64.RawURLEncoding.EncodeToString(append([]byte(signatureMark), h.Sum(nil)...))
}

// issue makes a token of a ServiceAccount, bound to the Pod if there is one.
func issue(namespace, serviceAccount string, pod map[string]string, lifetime time.Duration, audiences ...string) string {
	c := claims{Audience: audiences, Expires: time.Now().Add(lifetime).Unix(), Serial: serial.Add(1)}
	c.Kubernetes.Namespace, c.Kubernetes.Pod = namespace, pod
	c.Kubernetes.ServiceAccount = map[string]string{"name": serviceAccount, "uid": "5a"}
	c.Subject = "system:serviceaccount:" + namespace + ":" + serviceAccount
	text, _ := json.Marshal(c)
	payload := base64.RawURLEncoding.EncodeToString(text)
	return tokenHeader + "." + payload + "." + sign(payload)
}

func driverToken() string {
	namespace, name, _ := strings.Cut(driverUser, "/")
	return issue(namespace, name, map[string]string{"name": "connectors-csi-x", "uid": "d"}, time.Hour, apiAudience)
}

func decodeClaims(token string) (c claims, ok bool) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, false
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[1])
	return c, err == nil && json.Unmarshal(text, &c) == nil
}

// secretIn names the secret that the text contains, or "".
func secretIn(text string) string {
	base64Of := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	for what, secret := range sorted(map[string]string{
		"a token's header":                tokenHeader,
		"a token's header in base64":      base64Of(tokenHeader)[:40],
		"a token's header in Basic":       base64Of(":" + tokenHeader)[:40],
		"a token's payload":               base64.RawURLEncoding.EncodeToString([]byte(`{"aud":["http`))[:16],
		"a token's signature":             base64.RawURLEncoding.EncodeToString([]byte(signatureMark))[:26],
		"the content of a file":           fileMark,
		"the content of a file in base64": base64Of(fileMark)[:30],
	}) {
		if i := strings.Index(text, secret); i >= 0 {
			return fmt.Sprintf("%s: … %q …", what, text[max(0, i-200):min(len(text), i+200)])
		}
	}
	return ""
}

// apiServer is an API server: it holds objects, checks tokens, and answers as Kubernetes does.
type apiServer struct {
	*httptest.Server
	t testing.TB

	mu          sync.Mutex
	objects     map[string][]byte // by path
	version     int               // the last resourceVersion
	history     []apiEvent        // since the version horizon
	horizon     int
	streams     map[*apiStream]bool // that are open
	watches     []watchRequest      // that have come
	noWatch     bool                // nobody may watch
	down        chan struct{}       // is closed when the server is
	forbidden   map[string]bool     // "namespace/serviceaccount path", or "namespace/serviceaccount watch path"
	ended       map[string]bool     // tokens that are accepted no more
	noTokens    bool                // the driver may not request tokens
	podUIDs     map[string]bool
	lifetime    time.Duration // of the tokens it issues, if not what the request asks for
	clock       time.Duration // how far its clock is ahead of the node's
	requests    map[string]int
	readers     map[string]string // who was the last to ask for a path
	lastRequest map[string]object // the last body by path
	driverToken string            // that the driver used last
	intercept   func(http.ResponseWriter, *http.Request) bool
	connections atomic.Int32
	protocols   map[string]bool
}

func newAPIServer(t testing.TB) *apiServer {
	a := &apiServer{t: t, objects: map[string][]byte{}, forbidden: map[string]bool{}, podUIDs: map[string]bool{},
		streams: map[*apiStream]bool{}, ended: map[string]bool{},
		requests: map[string]int{}, readers: map[string]string{}, lastRequest: map[string]object{}, protocols: map[string]bool{}}
	a.listen("127.0.0.1:0")
	t.Cleanup(a.Close)
	return a
}

// listen starts the server.
func (a *apiServer) listen(address string) {
	a.down = make(chan struct{})
	a.Server = httptest.NewUnstartedServer(a)
	a.Server.Listener.Close()
	eventually(a.t, "the API server has its address", func() (ok bool) {
		listener, err := net.Listen("tcp", address)
		a.Server.Listener = listener
		return err == nil
	})
	a.EnableHTTP2 = true
	a.Config.HTTP2 = &http.HTTP2Config{MaxConcurrentStreams: 100}
	a.Config.ErrorLog = slog.NewLogLogger(slog.NewTextHandler(io.Discard, nil), slog.LevelError)
	a.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			a.connections.Add(1)
		}
	}
	a.StartTLS()
}

// Close stops the server, with all its connections. It keeps its objects.
func (a *apiServer) Close() {
	a.set(func() {
		select {
		case <-a.down:
		default:
			close(a.down)
		}
	})
	a.Listener.Close()
	a.CloseClientConnections()
	a.Server.Close()
}

// restart starts the server again, after Close or by itself. What was before it knows no more.
func (a *apiServer) restart() {
	a.Close()
	a.forgetHistory()
	a.listen(a.Listener.Addr().String())
}

// forgetHistory makes the server answer 410 to whom wants to know what came after an older resourceVersion.
func (a *apiServer) forgetHistory() {
	a.set(func() { a.history, a.horizon = nil, a.version })
}

func connectorPath(namespace, name string) string {
	return "/apis/connectors.alauda.io/v1alpha1/namespaces/" + namespace + "/connectors/" + name
}

func classPath(name string) string {
	return "/apis/connectors.alauda.io/v1alpha1/connectorclasses/" + name
}

func tokenPath(namespace, serviceAccount string) string {
	return "/api/v1/namespaces/" + namespace + "/serviceaccounts/" + serviceAccount + "/token"
}

// put creates or changes objects.
func (a *apiServer) put(objects ...object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, o := range objects {
		metadata := o["metadata"].(object)
		path := classPath(metadata["name"].(string))
		if namespace, ok := metadata["namespace"].(string); ok {
			path = connectorPath(namespace, metadata["name"].(string))
		}
		a.version++
		kind, uid := "MODIFIED", stringAt(decoded(a.objects[path]), "metadata", "uid")
		if a.objects[path] == nil {
			kind, uid = "ADDED", fmt.Sprintf("uid-%d", a.version)
		}
		metadata["resourceVersion"], metadata["uid"] = strconv.Itoa(a.version), uid
		text, err := json.Marshal(o)
		must(a.t, err)
		a.objects[path] = text
		a.tell(apiEvent{kind, path, a.version, text})
	}
}

func (a *apiServer) remove(path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	o := decoded(a.objects[path])
	with(strconv.Itoa(a.version), "metadata", "resourceVersion")(o)
	text, err := json.Marshal(o)
	must(a.t, err)
	delete(a.objects, path)
	a.tell(apiEvent{"DELETED", path, a.version, text})
}

func decoded(text []byte) (o object) {
	json.Unmarshal(text, &o)
	return o
}

// forbid takes the right to read the path from a ServiceAccount ("namespace/name"), or to watch it ("watch path").
func (a *apiServer) forbid(serviceAccount, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.forbidden[serviceAccount+" "+path] = true
}

// allow gives it back.
func (a *apiServer) allow(serviceAccount, path string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.forbidden, serviceAccount+" "+path)
}

// set changes the server's behaviour.
func (a *apiServer) set(change func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	change()
}

// lastBody returns what came with the last request for the path.
func (a *apiServer) lastBody(path string) (body object) {
	a.set(func() { body = a.lastRequest[path] })
	return body
}

// lastReader returns who was the last to ask for the path.
func (a *apiServer) lastReader(path string) (user string) {
	a.set(func() { user = a.readers[path] })
	return user
}

// lastDriverToken returns the token of the driver's last request.
func (a *apiServer) lastDriverToken() (token string) {
	a.set(func() { token = a.driverToken })
	return token
}

// count tells how often the path was asked for, or anything at all where it is "". Watches do not count.
func (a *apiServer) count(path string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	if path != "" {
		return a.requests[path]
	}
	sum := 0
	for _, n := range a.requests {
		sum += n
	}
	return sum
}

// gate keeps requests waiting.
type gate struct {
	waiting atomic.Int32
	opened  chan struct{}
	open    func()
}

// hold makes the requests whose URI contains the text wait until the gate is opened.
func (a *apiServer) hold(text string) *gate {
	g := &gate{opened: make(chan struct{})}
	g.open = sync.OnceFunc(func() { close(g.opened) })
	a.t.Cleanup(g.open)
	a.set(func() {
		a.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.RequestURI(), text) {
				g.waiting.Add(1)
				defer g.waiting.Add(-1)
				select {
				case <-g.opened:
				case <-r.Context().Done():
				}
			}
			return false
		}
	})
	return g
}

// answer makes the requests whose URI contains the text end with this answer, until it is called with "".
func (a *apiServer) answer(text string, code int, body string, header ...string) {
	a.set(func() {
		a.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if text == "" || !strings.Contains(r.URL.RequestURI(), text) {
				return false
			}
			for pair := range slices.Chunk(header, 2) {
				w.Header().Set(pair[0], pair[1])
			}
			w.WriteHeader(code)
			io.WriteString(w, body)
			return true
		}
	})
}

// statusBody is the object that the API server answers with where it answers with an error.
func statusBody(code int, reason, format string, a ...any) string {
	text, _ := json.Marshal(object{"kind": "Status", "apiVersion": "v1", "metadata": object{}, "status": "Failure",
		"message": fmt.Sprintf(format, a...), "reason": reason, "details": object{}, "code": code})
	return string(text)
}

func (a *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	var sent object
	json.Unmarshal(body, &sent)
	token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
	c, _ := decodeClaims(token)
	user := c.Kubernetes.Namespace + "/" + c.Kubernetes.ServiceAccount["name"]
	watching := r.URL.Query().Has("watch")
	a.mu.Lock()
	down := a.down
	if watching {
		a.watches = append(a.watches, parseWatch(r, user, token))
	} else {
		a.requests[r.URL.Path]++
	}
	a.readers[r.URL.Path], a.lastRequest[r.URL.Path], a.protocols[r.Proto] = user, sent, true
	if user == driverUser {
		a.driverToken = token
	}
	intercept := a.intercept
	a.mu.Unlock()
	if intercept != nil && intercept(w, r) {
		return
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	select {
	case <-down:
		panic(http.ErrAbortHandler)
	default:
	}
	fail := func(code int, reason, format string, args ...any) {
		w.WriteHeader(code)
		io.WriteString(w, statusBody(code, reason, format, args...))
	}
	parts := strings.Split(token, ".")
	authentic := len(parts) == 3 && parts[2] == sign(parts[1]) && c.Expires > time.Now().Unix() && slices.Contains(c.Audience, apiAudience) && !a.ended[token]
	isDriver, isClass := user == driverUser, strings.Contains(r.URL.Path, "/connectorclasses")
	subject := "system:serviceaccount:" + strings.Replace(user, "/", ":", 1)
	switch {
	case !authentic:
		fail(http.StatusUnauthorized, "Unauthorized", "Unauthorized")
	case watching:
		request := parseWatch(r, user, token)
		resource := strings.Split(request.path, "/")
		switch {
		case request.malformed:
			fail(http.StatusBadRequest, "BadRequest", "malformed watch: %s", r.URL.RawQuery)
		case a.noWatch || a.forbidden[user+" watch "+request.path] || isDriver != isClass:
			fail(http.StatusForbidden, "Forbidden", `%s.connectors.alauda.io %q is forbidden: User %q cannot watch resource %q in API group "connectors.alauda.io"`,
				resource[len(resource)-2], resource[len(resource)-1], subject, resource[len(resource)-2])
		default:
			a.serveWatch(w, r, request, down)
		}
	case strings.HasSuffix(r.URL.Path, "/token"):
		a.issueToken(w, r.URL.Path, sent, fail, isDriver && !a.noTokens, subject)
	case a.forbidden[user+" "+r.URL.Path] || isDriver != isClass:
		resource := strings.Split(r.URL.Path, "/")
		fail(http.StatusForbidden, "Forbidden", `%s.connectors.alauda.io %q is forbidden: User %q cannot get resource %q in API group "connectors.alauda.io"`,
			resource[len(resource)-2], resource[len(resource)-1], subject, resource[len(resource)-2])
	case a.objects[r.URL.Path] == nil:
		resource := strings.Split(r.URL.Path, "/")
		fail(http.StatusNotFound, "NotFound", "%s.connectors.alauda.io %q not found", resource[len(resource)-2], resource[len(resource)-1])
	default:
		w.Write(a.objects[r.URL.Path])
	}
}

// watchRequest is a request to watch one object.
type watchRequest struct {
	reader, path, token string // the path is that of the object
	version             string // from which on; "" for the present
	seconds             int    // that the stream may last
	metadataOnly        bool   // as PartialObjectMetadata
	malformed           bool
}

func parseWatch(r *http.Request, reader, token string) watchRequest {
	query := r.URL.Query()
	name, one := strings.CutPrefix(query.Get("fieldSelector"), "metadata.name=")
	seconds, err := strconv.Atoi(query.Get("timeoutSeconds"))
	_, err2 := strconv.ParseUint(cmp.Or(query.Get("resourceVersion"), "0"), 10, 63)
	w := watchRequest{reader, r.URL.Path + "/" + name, token, query.Get("resourceVersion"), seconds, false, false}
	w.metadataOnly = r.Header.Get("Accept") == "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	query.Del("resourceVersion")
	w.malformed = r.Method != http.MethodGet || query.Get("watch") != "1" || query.Get("allowWatchBookmarks") != "true" ||
		!one || !isDNSName(name) || cmp.Or(err, err2) != nil || seconds <= 0 || len(query) != 4
	return w
}

// apiEvent is a change of an object.
type apiEvent struct {
	kind, path string // ADDED, MODIFIED or DELETED
	version    int
	object     []byte
}

// apiStream is an answer to a watch that goes on.
type apiStream struct {
	watchRequest
	api     *apiServer
	lines   chan string // to be sent; closed when the stream shall end
	aborted bool        // it shall end as one of a server that dies
}

// serveWatch answers a watch:
//
//  1. with what has happened since the resourceVersion; or, without one, with the object as it is
//  2. with what happens to the object, until the time is over or the test ends the stream
//
// The caller holds the lock, which is given back while the stream is open.
func (a *apiServer) serveWatch(w http.ResponseWriter, r *http.Request, request watchRequest, down chan struct{}) {
	s := &apiStream{watchRequest: request, api: a, lines: make(chan string, 10_000)}
	a.streams[s] = true

	// 1. what was
	since, _ := strconv.Atoi(request.version)
	current := a.objects[request.path]
	switch {
	case request.version == "" && current != nil:
		s.tell(apiEvent{"ADDED", request.path, a.version, current})
	case request.version != "" && since < a.horizon:
		s.fail(http.StatusGone, "Expired")
		s.end()
	case request.version != "":
		for _, e := range a.history {
			if e.version > since && e.path == s.path {
				s.tell(e)
			}
		}
	}

	// 2. what comes
	a.mu.Unlock()
	defer func() {
		a.mu.Lock() // the caller's
		delete(a.streams, s)
	}()
	w.WriteHeader(http.StatusOK)
	flush := http.NewResponseController(w).Flush
	timeout := time.After(time.Duration(request.seconds) * time.Second)
	for flush() == nil {
		select {
		case line, more := <-s.lines:
			if !more && s.aborted {
				panic(http.ErrAbortHandler)
			} else if !more {
				return
			}
			io.WriteString(w, line)
		case <-down:
			panic(http.ErrAbortHandler)
		case <-timeout:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// tell sends an event to those who watch its object. The caller holds the lock.
func (a *apiServer) tell(e apiEvent) {
	a.history = append(a.history, e)
	for s := range a.streams {
		if s.path == e.path {
			s.tell(e)
		}
	}
}

// tell is what the server does, with the lock held; the test uses the methods below. A client that does not read is
// not waited for.
func (s *apiStream) tell(e apiEvent) {
	text := string(e.object)
	if s.metadataOnly {
		metadata, _ := json.Marshal(decoded(e.object)["metadata"])
		text = fmt.Sprintf(`{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1","metadata":%s}`, metadata)
	}
	s.queue(fmt.Sprintf(`{"type":%q,"object":%s}`, e.kind, text) + "\n")
}

func (s *apiStream) queue(text string) {
	if !s.api.streams[s] {
		return // it has ended
	}
	select {
	case s.lines <- text:
	default:
		s.end()
	}
}

// end ends the stream after what was sent. The caller holds the lock.
func (s *apiStream) end() {
	if s.api.streams[s] {
		delete(s.api.streams, s)
		close(s.lines)
	}
}

// close ends the stream after what was sent, in good order or as a server does that dies.
func (s *apiStream) close(abort bool) {
	s.api.set(func() {
		s.aborted = abort
		s.end()
	})
}

func (s *apiStream) fail(code int, reason string) {
	s.queue(fmt.Sprintf(`{"type":"ERROR","object":%s}`, statusBody(code, reason, "the test says so")) + "\n")
}

// send sends text as it is: not a whole line, more than one, or a huge one.
func (s *apiStream) send(text string) { s.api.set(func() { s.queue(text) }) }

// bookmark tells the server's version.
func (s *apiStream) bookmark() {
	s.api.set(func() {
		s.queue(fmt.Sprintf(`{"type":"BOOKMARK","object":{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/v1",`+
			`"metadata":{"resourceVersion":"%d","creationTimestamp":null}}}`, s.api.version) + "\n")
	})
}

// stream waits until the reader has a stream for the path, and returns it.
func (a *apiServer) stream(reader, path string) (found *apiStream) {
	a.t.Helper()
	eventually(a.t, reader+" watches "+path, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		for s := range a.streams {
			if s.reader == reader && s.path == path {
				found = s
			}
		}
		return found != nil
	})
	return found
}

// awaitStreams waits until so many streams are open, and there are no more.
func (a *apiServer) awaitStreams(count int) {
	a.t.Helper()
	eventually(a.t, fmt.Sprintf("%d streams are open", count), func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.streams) == count
	})
}

// watched returns the requests to watch the path that have come.
func (a *apiServer) watched(path string) (requests []watchRequest) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, w := range a.watches {
		if w.path == path {
			requests = append(requests, w)
		}
	}
	return requests
}

// issueToken answers a TokenRequest, under the API server's rules for it.
func (a *apiServer) issueToken(w http.ResponseWriter, path string, sent object, fail func(int, string, string, ...any), allowed bool, user string) {
	parts := strings.Split(path, "/")
	namespace, serviceAccount := parts[4], parts[6]
	seconds, _ := valueAt(sent, "spec", "expirationSeconds").(float64)
	podName, uid := stringAt(sent, "spec", "boundObjectRef", "name"), stringAt(sent, "spec", "boundObjectRef", "uid")
	switch {
	case !allowed:
		fail(http.StatusForbidden, "Forbidden", `serviceaccounts %q is forbidden: User %q cannot create resource "serviceaccounts/token" in API group "" in the namespace %q`,
			serviceAccount, user, namespace)
		return
	case seconds < 600:
		fail(http.StatusUnprocessableEntity, "Invalid", "spec.expirationSeconds: Invalid value: %v: may not specify a duration less than 10 minutes", seconds)
		return
	case stringAt(sent, "spec", "boundObjectRef", "kind") != "Pod" || !a.podUIDs[uid]:
		fail(http.StatusConflict, "Conflict", "the UID in the bound object reference (%s) does not match the UID in record", uid)
		return
	}
	lifetime := time.Duration(seconds) * time.Second
	if a.lifetime != 0 {
		lifetime = a.lifetime
	}
	audiences := []string{apiAudience}
	if list, ok := valueAt(sent, "spec", "audiences").([]any); ok {
		audiences = nil
		for _, audience := range list {
			audiences = append(audiences, audience.(string))
		}
	}
	w.WriteHeader(http.StatusCreated)
	spec := maps.Clone(sent["spec"].(object))
	spec["expirationSeconds"] = int64(lifetime / time.Second)
	json.NewEncoder(w).Encode(object{"kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1", "spec": spec, "status": object{
		"token":               issue(namespace, serviceAccount, map[string]string{"name": podName, "uid": uid}, lifetime, audiences...),
		"expirationTimestamp": time.Now().Add(a.clock).Add(lifetime).UTC().Format(time.RFC3339),
	}})
}

// node is one node of a cluster: kubelet's directory, the API server, and a driver once it is started.
type node struct {
	t      testing.TB
	dir    string // kubelet's --root-dir
	api    *apiServer
	driver *driver // where it runs in this process
	stop   func()  // ends that driver as SIGTERM does, and waits for it
	conn   *grpc.ClientConn
	http   string // the address of /healthz and so on
}

var nodes atomic.Int32

// newNode makes a node without a driver. Its API server has the ConnectorClass "git" and the Connector "git".
func newNode(t testing.TB) *node {
	n := &node{t: t, dir: fmt.Sprintf("%s/%d", kubeletRoot, nodes.Add(1)), api: newAPIServer(t)}
	for _, dir := range []string{n.podsDir(), n.dir + "/plugins_registry"} {
		must(t, os.MkdirAll(dir, 0o750))
	}
	n.api.put(gitClass(), connector("default", "git", "git"))
	logged := len(logs.String())
	t.Cleanup(func() {
		for _, m := range mountsBelow(n.dir) {
			unix.Unmount(m.point, unix.MNT_DETACH)
		}
		if secret := secretIn(logs.String()[logged:]); secret != "" {
			t.Errorf("the log contains %s", secret)
		}
		if t.Failed() && testing.Verbose() {
			t.Log(logs.String()[logged:])
		}
	})
	return n
}

// startNode makes a node with a driver inside the test process.
func startNode(t testing.TB, change ...func(*driver)) *node {
	n := newNode(t)
	n.start(change...)
	return n
}

// startPolling makes a node whose API server lets nobody watch.
func startPolling(t testing.TB, change ...func(*driver)) *node {
	n := newNode(t)
	n.api.noWatch = true
	n.start(change...)
	return n
}

// start runs the driver inside the test process, put together as run does it. Objects stay in its cache for an hour.
func (n *node) start(change ...func(*driver)) {
	n.t.Helper()
	host, port, err := net.SplitHostPort(n.api.Listener.Addr().String())
	must(n.t, err)
	n.t.Setenv("KUBERNETES_SERVICE_HOST", host)
	n.t.Setenv("KUBERNETES_SERVICE_PORT", port)
	budget, err := newBudget(n.podsDir(), 240<<20)
	must(n.t, err)
	m := newMetrics(budget)
	k, err := newKube(time.Hour, m)
	must(n.t, err)
	n.driver = &driver{nodeName: "node-1", podsDir: n.podsDir(), kube: k, renderers: newRenderers(rendererBinary(), m), budget: budget, metrics: m,
		busy: map[string]*holder{}, volumes: map[string]*volume{}, tokens: map[string]issuedToken{}}
	for _, c := range change {
		c(n.driver)
	}
	logged := len(logs.String())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- serve(ctx, n.driver, n.socket(), "127.0.0.1:0") }()
	n.stop = sync.OnceFunc(func() {
		n.conn.Close()
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("serve: %v", err)
		}
		k.client.CloseIdleConnections()
	})
	n.dial()
	n.http = n.awaitStart(func() string { return logs.String()[logged:] })
	n.t.Cleanup(n.stop)
}

// rendererBinary is what the drivers of the tests run as renderers: this program, linked as the released one is. A
// dynamic one would not start in an empty root directory, and the race detector needs more memory than a renderer has.
var rendererBinary = sync.OnceValue(func() string {
	binary := filepath.Join(containerDir, "renderer.test")
	info, _ := debug.ReadBuildInfo()
	if slices.Contains(info.Settings, debug.BuildSetting{Key: "CGO_ENABLED", Value: "0"}) {
		program, err := os.ReadFile(thisBinary)
		if err = cmp.Or(err, os.WriteFile(binary, program, 0o755)); err != nil { // where another user gets to it
			panic(err)
		}
		return binary
	}
	build := exec.Command("go", "test", "-c", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		panic(fmt.Sprintf("%v: %s", err, out))
	}
	return binary
})

var startedLine = regexp.MustCompile(`started .*http=([0-9.:]+)`)

// awaitStart waits for the line that the driver logs when it serves, and returns its HTTP address.
func (n *node) awaitStart(log func() string) (address string) {
	n.t.Helper()
	eventually(n.t, "the driver starts", func() bool {
		match := startedLine.FindStringSubmatch(log())
		if match != nil {
			address = match[1]
		}
		return match != nil
	})
	return address
}

// dial makes a connection to the driver's socket. Every error that comes over it is searched for secrets.
func (n *node) dial() {
	check := func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
		err := invoke(ctx, method, request, reply, conn, options...)
		if err == nil {
			return nil
		}
		if secret := secretIn(err.Error()); secret != "" {
			n.t.Errorf("the error of %s contains %s", method, secret)
		}
		return err
	}
	conn, err := grpc.NewClient("unix:"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(check), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	must(n.t, err)
	n.conn = conn
	n.t.Cleanup(func() { conn.Close() })
}

// awaitCalls waits until exactly so many calls are under way in the driver.
func (n *node) awaitCalls(count int) {
	n.t.Helper()
	eventually(n.t, fmt.Sprintf("%d calls are under way", count), func() bool {
		n.driver.mu.Lock()
		defer n.driver.mu.Unlock()
		return len(n.driver.busy) == count
	})
}

func (n *node) podsDir() string { return n.dir + "/pods" }
func (n *node) socket() string  { return n.dir + "/plugins_registry/connectors-csi-reg.sock" }

// age makes every object in the driver's cache an hour older, which is its refresh interval, for startPolling.
func (n *node) age() {
	n.driver.kube.mu.Lock()
	defer n.driver.kube.mu.Unlock()
	for _, c := range n.driver.kube.cache {
		for reader, began := range c.readers {
			c.readers[reader] = began.Add(-n.driver.kube.refresh)
		}
	}
}

// get asks the driver's HTTP port.
func (n *node) get(path string) (code int, body string) {
	n.t.Helper()
	response, err := http.Get("http://" + n.http + path)
	must(n.t, err)
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	must(n.t, err)
	return response.StatusCode, string(text)
}

// process is a driver in a process of its own.
type process struct {
	*exec.Cmd
	log    *lockedBuffer
	exited chan struct{}
}

// run starts a driver in a process of its own: this binary, which calls main(), or another one.
func (n *node) run(binary string, environment []string, arguments ...string) *process {
	n.t.Helper()
	host, port, err := net.SplitHostPort(n.api.Listener.Addr().String())
	must(n.t, err)
	p := &process{Cmd: exec.Command(binary, arguments...), log: &lockedBuffer{}, exited: make(chan struct{})}
	p.Env = append(os.Environ(), roleKey+"="+roleDriver, "NODE_NAME=node-1", "KUBERNETES_SERVICE_HOST="+host, "KUBERNETES_SERVICE_PORT="+port)
	p.Env = append(p.Env, "GOMEMLIMIT=48MiB") // as deploy.yaml has it
	p.Env = append(p.Env, environment...)
	p.Stderr = io.MultiWriter(p.log, &logs)
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(n.t, p.Start())
	go func() { p.Wait(); close(p.exited) }()
	n.t.Cleanup(p.kill)
	return p
}

const thisBinary = "/proc/self/exe"

// startProcess starts a driver in a process of its own and waits until it serves. Since nobody may watch, every call
// reads every object.
func (n *node) startProcess() *process {
	n.api.set(func() { n.api.noWatch = true })
	return n.startBinary(rendererBinary(), "--refresh-interval=1ns")
}

func (n *node) startBinary(binary string, arguments ...string) *process {
	n.t.Helper()
	p := n.run(binary, nil, append(arguments, "--kubelet-dir="+n.dir, "--http-address=127.0.0.1:0")...)
	n.http = n.awaitStart(p.log.String)
	if n.conn != nil {
		n.conn.Close()
	}
	n.dial()
	return p
}

// awaitExit waits until the process has ended by itself.
func (p *process) awaitExit(t testing.TB) {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(time.Minute):
		t.Fatalf("the driver goes on: %s", p.log)
	}
}

func (p *process) kill() {
	p.Process.Kill()
	<-p.exited
}

// testPod is a Pod on a node.
type testPod struct {
	node                                 *node
	namespace, name, uid, serviceAccount string
	token                                string
}

// pod makes a Pod, which runs as the ServiceAccount "default" of the namespace "default" or as another one.
func (n *node) pod(serviceAccount ...string) *testPod {
	i := serial.Add(1)
	p := &testPod{node: n, namespace: "default", serviceAccount: "default", name: fmt.Sprintf("pod-%d", i), uid: fmt.Sprintf("0f5e7ed5-0000-4000-8000-%012d", i)}
	for _, s := range serviceAccount {
		p.namespace, p.serviceAccount, _ = strings.Cut(s, "/")
	}
	n.api.set(func() { n.api.podUIDs[p.uid] = true })
	p.renewToken()
	return p
}

// renewToken gives the Pod a new token, as kubelet does when the old one is about to expire.
func (p *testPod) renewToken() {
	p.token = issue(p.namespace, p.serviceAccount, map[string]string{"name": p.name, "uid": p.uid}, 30*time.Minute, apiAudience)
}

// podVolume is a volume of a Pod.
type podVolume struct {
	t      testing.TB
	node   *node
	pod    *testPod
	target string
	// attributes are the volumeAttributes
	attributes map[string]string
	// change changes the request before it is sent
	change func(*csi.NodePublishVolumeRequest)
}

type attrs = map[string]string

// volume makes a volume of a new Pod: the configuration "config" of the Connector "git", with other or more
// attributes where there are some. An attribute of "-" is left out.
func (n *node) volume(attributes ...attrs) *podVolume { return n.pod().volume("config", attributes...) }

func (p *testPod) volume(name string, attributes ...attrs) *podVolume {
	v := &podVolume{t: p.node.t, node: p.node, pod: p, attributes: attrs{"connector.name": "git", "configuration.names": "config"}}
	v.target = filepath.Join(p.node.podsDir(), p.uid, "volumes/kubernetes.io~csi", name, "mount")
	for _, a := range attributes {
		maps.Copy(v.attributes, a)
	}
	maps.DeleteFunc(v.attributes, func(_, value string) bool { return value == "-" })
	must(v.t, os.MkdirAll(filepath.Dir(v.target), 0o750)) // kubelet makes the parent
	return v
}

// request is what kubelet sends.
func (v *podVolume) request() *csi.NodePublishVolumeRequest {
	tokens, err := json.Marshal(object{"": object{"token": v.pod.token, "expirationTimestamp": "2026-01-01T00:00:00Z"}})
	must(v.t, err)
	volumeContext := attrs{
		"csi.storage.k8s.io/pod.name":            v.pod.name,
		"csi.storage.k8s.io/pod.namespace":       v.pod.namespace,
		"csi.storage.k8s.io/pod.uid":             v.pod.uid,
		"csi.storage.k8s.io/serviceAccount.name": v.pod.serviceAccount,
		"csi.storage.k8s.io/ephemeral":           "true",
	}
	maps.Copy(volumeContext, v.attributes)
	request := &csi.NodePublishVolumeRequest{
		VolumeId:   fmt.Sprintf("csi-%x", sha256.Sum256([]byte(v.target))),
		TargetPath: v.target,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		Readonly:      true,
		VolumeContext: volumeContext,
		Secrets:       attrs{"csi.storage.k8s.io/serviceAccount.tokens": string(tokens)},
	}
	if v.change != nil {
		v.change(request)
	}
	return request
}

func (v *podVolume) publish() error { return v.publishWithin(time.Minute) }

func (v *podVolume) publishWithin(timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	_, err := csi.NewNodeClient(v.node.conn).NodePublishVolume(ctx, v.request())
	return err
}

func (v *podVolume) unpublish() error {
	_, err := csi.NewNodeClient(v.node.conn).NodeUnpublishVolume(context.Background(), &csi.NodeUnpublishVolumeRequest{VolumeId: v.request().VolumeId, TargetPath: v.target})
	return err
}

// mustPublish publishes, and the volume is one mount.
func (v *podVolume) mustPublish() {
	v.t.Helper()
	must(v.t, v.publish())
	if n := len(mountsBelow(v.target)); n != 1 {
		v.t.Fatalf("%s has %d mounts", v.target, n)
	}
}

// publishAtOnce begins to publish all of the volumes at the same time. The channel has an outcome for each.
func publishAtOnce(volumes []*podVolume) <-chan error {
	results := make(chan error, len(volumes))
	for _, v := range volumes {
		go func() { results <- v.publish() }()
	}
	return results
}

// settle publishes twice, after which the driver has nothing left to do for the volume.
func (v *podVolume) settle() {
	v.t.Helper()
	v.mustPublish()
	v.mustPublish()
}

func (v *podVolume) mustUnpublish() {
	v.t.Helper()
	must(v.t, v.unpublish())
	v.wantNothing()
}

// wantNothing makes sure that there is no mount at the target path, and no directory.
func (v *podVolume) wantNothing() {
	v.t.Helper()
	if _, err := os.Lstat(v.target); !errors.Is(err, fs.ErrNotExist) || len(mountsBelow(v.target)) > 0 {
		v.t.Errorf("something is left at %s: %v, %v", v.target, err, mountsBelow(v.target))
	}
}

// mustRefuse publishes a volume that is not published, which has to fail with the code and the words and to leave nothing.
func (v *podVolume) mustRefuse(code codes.Code, words ...string) {
	v.t.Helper()
	wantError(v.t, v.publish(), code, words...)
	v.wantNothing()
}

func wantError(t testing.TB, err error, code codes.Code, words ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("code %v, not %v, in: %v", status.Code(err), code, err)
	}
	for _, word := range words {
		if !strings.Contains(status.Convert(err).Message(), word) {
			t.Errorf("no %q in: %v", word, err)
		}
	}
}

// read returns the files that a container sees.
func (v *podVolume) read() map[string]string {
	v.t.Helper()
	entries, err := os.ReadDir(v.target)
	must(v.t, err)
	contents := map[string]string{}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "..") {
			text, err := os.ReadFile(filepath.Join(v.target, e.Name()))
			must(v.t, err)
			contents[e.Name()] = string(text)
		}
	}
	return contents
}

// file returns what is in one file.
func (v *podVolume) file(name string) string {
	v.t.Helper()
	text, err := os.ReadFile(filepath.Join(v.target, name))
	must(v.t, err)
	return string(text)
}

// want compares a file's content.
func (v *podVolume) want(name, content string) {
	v.t.Helper()
	if got := v.file(name); got != content {
		v.t.Errorf("%s is %q, not %q", name, got, content)
	}
}

// wantFiles compares the names of the files.
func (v *podVolume) wantFiles(names ...string) {
	v.t.Helper()
	if got := slices.Sorted(maps.Keys(v.read())); !slices.Equal(got, names) {
		v.t.Errorf("files %v, not %v", got, names)
	}
}

// wantClean makes sure that the volume holds one generation, its links and at most the generation before, which stays
// until the next call for those who are just reading it.
func (v *podVolume) wantClean() {
	v.t.Helper()
	generation, err := os.Readlink(v.target + "/..data")
	must(v.t, err)
	entries, err := os.ReadDir(v.target)
	must(v.t, err)
	before := 0
	for _, e := range entries {
		switch link, _ := os.Readlink(v.target + "/" + e.Name()); {
		case e.Name() == "..data", e.Name() == generation && e.IsDir():
		case strings.HasPrefix(e.Name(), "..gen-") && e.IsDir() && before == 0:
			before++
		case link == "..data/"+e.Name():
			v.file(e.Name())
		default:
			v.t.Errorf("%s holds %s", v.target, e.Name())
		}
	}
}

// generation identifies the directory that the volume's files are in.
func (v *podVolume) generation() uint64 {
	v.t.Helper()
	info, err := os.Stat(v.target + "/..data")
	must(v.t, err)
	return info.Sys().(*syscall.Stat_t).Ino
}

// writable opens the volume for writing, by a clone of its mount, and returns a path to it.
func (v *podVolume) writable() string {
	v.t.Helper()
	clone, err := unix.OpenTree(unix.AT_FDCWD, v.target, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	must(v.t, err)
	v.t.Cleanup(func() { unix.Close(clone) })
	must(v.t, unix.MountSetattr(clone, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY}))
	return fmt.Sprintf("/proc/self/fd/%d", clone)
}

// mountLine is a line of /proc/self/mountinfo.
type mountLine struct{ point, options, fstype, source, super string }

// mountsBelow returns the mounts at the path and below it.
func mountsBelow(path string) []mountLine {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		panic(err)
	}
	var mounts []mountLine
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if f[4] == path || strings.HasPrefix(f[4], path+"/") {
			rest := f[slices.Index(f, "-")+1:]
			mounts = append(mounts, mountLine{f[4], f[5], rest[0], rest[1], rest[2]})
		}
	}
	return mounts
}

// connector makes a Connector with an address and a proxy.
func connector(namespace, name, class string, change ...func(object)) object {
	o := object{
		"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "Connector",
		"metadata": object{"name": name, "namespace": namespace, "annotations": object{"mark": fileMark}},
		"spec":     object{"connectorClassName": class, "address": "https://" + name + ".example.com"},
		"status": object{
			"conditions": []any{object{"type": "Ready", "status": "True"}},
			"proxy":      object{"httpAddress": object{"url": "http://c-" + name + "." + namespace + ".svc.cluster.local"}},
		},
	}
	for _, c := range change {
		c(o)
	}
	return o
}

// with sets the field at the path to the value, or removes it if the value is nil.
func with(value any, path ...string) func(object) {
	return func(o object) {
		for _, field := range path[:len(path)-1] {
			if o[field] == nil {
				o[field] = object{}
			}
			o = o[field].(object)
		}
		if last := path[len(path)-1]; value == nil {
			delete(o, last)
		} else {
			o[last] = value
		}
	}
}

// class makes a ConnectorClass.
func class(name string, configurations ...object) object {
	list := []any{}
	for _, c := range configurations {
		list = append(list, c)
	}
	return object{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "ConnectorClass", "metadata": object{"name": name}, "spec": object{"configurations": list}}
}

// configuration makes a configuration of a class: file names and templates in turn.
func configuration(name string, data ...string) object {
	templates := object{}
	for pair := range slices.Chunk(data, 2) {
		templates[pair[0]] = pair[1]
	}
	return object{"name": name, "data": templates}
}

// param makes a parameter of a configuration, from field names and values in turn.
func param(name string, fields ...any) any {
	p := object{"name": name}
	for pair := range slices.Chunk(fields, 2) {
		p[pair[0].(string)] = pair[1]
	}
	return p
}

// certificate makes a PEM block as a certificate is one, with the text in place of the certificate.
func certificate(text string) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte(text)}))
}

func gitClass() object {
	return class("git",
		configuration("config",
			".gitconfig", "[http]\n\textraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n[url \"{{ .connector.status.proxyAddress }}\"]\n\tinsteadOf = {{ .connector.spec.address }}\n",
			"token", "{{ .context.token }}",
			"mark", "{{ .connector.metadata.annotations.mark }}"),
		configuration("first", "shared", "from first", "one", "1"),
		configuration("second", "shared", "from second", "two", "2"))
}
