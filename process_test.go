package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
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
	taken := n.dir + "/taken"
	must(t, errors.Join(os.MkdirAll(taken+"/pods", 0o755), os.MkdirAll(taken+"/plugins_registry", 0o755)))
	other, err := net.Listen("unix", taken+"/plugins_registry/connectors-csi-reg.sock")
	must(t, err)
	defer other.Close()
	deep := n.dir + "/" + strings.Repeat("x", 110-len(n.dir)-1)
	must(t, errors.Join(os.MkdirAll(deep+"/pods", 0o755), os.MkdirAll(deep+"/plugins_registry", 0o755)))
	for what, c := range sorted(map[string]struct {
		environment []string
		arguments   []string
		word        string
	}{
		"no node name":  {[]string{"NODE_NAME="}, nil, "no node name: set NODE_NAME"},
		"no API server": {[]string{"KUBERNETES_SERVICE_HOST="}, nil, "KUBERNETES_SERVICE_HOST"},
		"not shared":    {nil, []string{"--kubelet-dir=" + notShared}, "not on a shared mount"},
		"no budget":     {nil, []string{"--volumes-budget=0"}, "--volumes-budget 0 must be above zero"},
		"a huge budget": {nil, []string{"--volumes-budget=17592186044417"},
			"--volumes-budget 17592186044417 must be above zero, and be a number of MiB"},
		"a relative directory": {nil, []string{"--kubelet-dir=kubelet"}, `--kubelet-dir "kubelet" must be an absolute path`},
		"too long a path": {nil, []string{"--kubelet-dir=" + deep},
			"is too long for the path of a socket: it has 151 bytes, and may have 107"},
		"another driver": {nil, []string{"--kubelet-dir=" + taken}, "another process serves " + taken +
			"/plugins_registry/connectors-csi-reg.sock"},
		"no such interval":     {nil, []string{"--refresh-interval=0s"}, "--refresh-interval 0s must be above zero"},
		"argument":             {nil, []string{"start"}, `unexpected argument "start"`},
		"port in use":          {nil, []string{"--http-address=" + busy.Addr().String()}, "address already in use"},
		"no socket in its way": {nil, []string{"--kubelet-dir=" + inTheWay}, "exists and is not a socket"},
		"no registry directory": {nil, []string{"--kubelet-dir=" + n.dir + "/noRegistry"},
			"mount kubelet's plugins_registry directory"},
	}) {
		t.Run(what, func(t *testing.T) {
			p := n.run(rendererBinary(), c.environment,
				append([]string{"--kubelet-dir=" + n.dir, "--http-address=127.0.0.1:0"}, c.arguments...)...)
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
	if log := p.log.String(); p.ProcessState.ExitCode() != 1 || strings.Count(log, "\n") != 1 ||
		!strings.HasPrefix(log, "connectors-csi: ") || !strings.Contains(log, word) {
		t.Errorf("exit code %d, and no single line with %q: %q", p.ProcessState.ExitCode(), word, log)
	}
}

func TestShutdownFinishesWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	n := newNode(t)
	p := n.startProcess()
	mounted, v := n.volume(), n.volume()
	mounted.mustPublish()
	gate := n.api.hold("/connectors/")
	result := make(chan error)
	go func() { result <- v.publish() }()
	gate.await(1, "the publish is under way")
	must(t, p.Process.Signal(syscall.SIGTERM))
	eventually(t, "the socket is removed", func() bool {
		_,
			err := os.Lstat(n.socket())
		return errors.Is(err, fs.ErrNotExist)
	})
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
	t.Parallel()
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
		lines = slices.DeleteFunc(strings.Split(p.log.String(), "\n"),
			func(l string) bool { return !strings.Contains(l, "publish") })
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
	t.Parallel()
	n := startNode(t)
	long := strings.Repeat("x", 30<<10)
	quotes := strings.Repeat("\"\x01\n", 10<<10)
	names := strings.Repeat(strings.Repeat("x", 62)+".", 3) + strings.Repeat("x", 60)
	for what, c := range sorted(map[string]struct {
		attributes attrs
		change     func(*csi.NodePublishVolumeRequest)
	}{
		"Connector":       {attrs{"connector.name": long}, nil},
		"namespace":       {attrs{"connector.namespace": long}, nil},
		"Connectors":      {attrs{"connector.name": "-", "connectors": numbered(names+"-", 32)}, nil},
		"many Connectors": {attrs{"connector.name": "-", "connectors": numbered("x", 4000)}, nil},
		"twice":           {attrs{"connector.name": "-", "connectors": names + "," + names}, nil},
		"configuration":   {attrs{"configuration.names": long}, nil},
		"control":         {attrs{"configuration.names": quotes}, nil},
		"long names":      {attrs{"configuration.names": numbered(names, 64)}, nil},
		"exclusions":      {attrs{"configuration.names": "config,!" + names}, nil},
		"params":          {attrs{"configuration.params": `{"` + long + `": {}}`}, nil},
		"params of long":  {attrs{"configuration.names": numbered(names, 64), "configuration.params": `{"y": {}}`}, nil},
		"expiration":      {attrs{"token.expiration": long}, nil},
		"quotes":          {attrs{"token.expiration": quotes}, nil},
		"key":             {attrs{long: ""}, nil},
		"large key":       {attrs{long + long: quotes}, nil},
		"enumeration": {attrs{"configuration.names": "enum", "configuration.params": `{"enum":{"p":"` + long + `"}}`},
			nil},
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
			log := n.logFromNow()
			err := v.publish()
			line := log()
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
	must(n.t, n.conn.Invoke(context.Background(), "/pluginregistration.Registration/"+method, &request, &reply,
		grpc.ForceCodecV2(rawCodec{})))
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
	t.Parallel()
	n := startNode(t)
	n.wantReady(503, "kubelet has not registered the driver yet")

	info := decodeStrings(t, n.callRegistration("GetInfo", nil))
	if want := (map[uint64][]string{1: {"CSIPlugin"}, 2: {"connectors-csi"},
		4: {"1.0.0"}}); fmt.Sprint(info) != fmt.Sprint(want) {
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
	if !strings.Contains(n.log.String(), "error=nope") {
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

	err := n.conn.Invoke(t.Context(), "/pluginregistration.Registration/NotifyRegistrationStatus", &[]byte{8}, &[]byte{},
		grpc.ForceCodecV2(rawCodec{}))
	wantError(t, err, codes.Internal, "failed to unmarshal") // there is no value
}

func TestSocket(t *testing.T) {
	t.Parallel()
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

// Whatever takes the place of the socket stays there, when the driver ends and before.
func TestSocketOfOthersStays(t *testing.T) {
	t.Parallel()
	file := func(path string) error { return os.WriteFile(path, []byte("other"), 0o644) }
	socket := func(path string) error {
		listener, err := net.Listen("unix", path)
		if err == nil {
			t.Cleanup(func() { listener.Close() })
		}
		return err
	}
	for what, c := range sorted(map[string]struct {
		make func(path string) error
		word string
	}{
		"a file":      {file, "exists and is not a socket"},
		"a directory": {func(path string) error { return os.Mkdir(path, 0o755) }, "exists and is not a socket"},
		"a link":      {func(path string) error { return os.Symlink("/none", path) }, "exists and is not a socket"},
		"a driver":    {socket, "another process serves"},
	}) {
		for _, end := range []string{"by itself", "by SIGTERM"} {
			t.Run(what+" "+end, func(t *testing.T) {
				n := newNode(t)
				p := n.startProcess()
				must(t, c.make(n.socket()+".other"))
				other, err := os.Lstat(n.socket() + ".other")
				must(t, err)
				must(t, os.Remove(n.socket()))
				must(t, os.Rename(n.socket()+".other", n.socket()))
				if end == "by SIGTERM" {
					must(t, p.Process.Signal(syscall.SIGTERM))
				}
				p.awaitExit(t)
				if end == "by itself" && !strings.Contains(p.log.String(), c.word) {
					t.Errorf("no %q in %s", c.word, p.log)
				}
				if now, err := os.Lstat(n.socket()); err != nil || !os.SameFile(now, other) {
					t.Errorf("it is gone: %v", err)
				}
				if what == "a driver" {
					conn, err := net.Dial("unix", n.socket())
					must(t, err)
					conn.Close()
				}
			})
		}
	}
}

// A new volume, other files in it, its end and a renderer's life need no more than what the driver keeps, also where
// renderers have no user namespace. One that could not be confined as usual would be missed in the log.
func TestDriverGivesUpCapabilities(t *testing.T) {
	t.Parallel()
	limit, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	must(t, err)
	missing := ""
	switch {
	case string(limit) == "0\n":
		missing = confinements[1].missing
	case !mayChooseUser(t): // to map root alone takes CAP_SETFCAP, which no driver on a node needs
		missing = confinements[len(confinements)-1].missing
	default:
		t.Run("without user namespaces", func(t *testing.T) {
			runInSmallNamespace(t, `echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"`)
		})
	}
	n := newNode(t)
	p := n.startProcess()
	v := n.volume()
	v.change = group("0")
	if mayChooseUser(t) {
		v.change = group("1234")
	}
	v.mustPublish()
	n.api.put(gitClassOf("file", "other"))
	v.mustPublish()
	v.wantFiles("file")
	v.mustUnpublish()
	warned := regexp.MustCompile(`missing="(.*?)"`).FindStringSubmatch(p.log.String() + ` missing=""`)
	if warned[1] != missing {
		t.Errorf("renderers lack %q, not %q: %s", warned[1], missing, p.log)
	}
	t.Logf("renderers lack %q", warned[1])
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

// runInSmallNamespace runs the test that it is part of once more, in a user namespace with as many users as a container
// has, by a script whose arguments are the command.
func runInSmallNamespace(t *testing.T, script string) {
	test, _, _ := strings.Cut(t.Name(), "/")
	self, err := os.Executable()
	must(t, err)
	cmd := exec.Command("sh", "-c", script, "sh", self, "-test.run=^"+test+"$")
	cmd.Env = append(os.Environ(), roleKey+"="+roleTests)
	all := []syscall.SysProcIDMap{{Size: 1 << 16}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS, UidMappings: all,
		GidMappings:                all,
		GidMappingsEnableSetgroups: true, Pdeathsig: syscall.SIGKILL}
	if output, err := runCommand(cmd); err != nil {
		t.Errorf("%v: %s", err, output)
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
	t.Parallel()
	n := startPolling(t)
	v, w := n.volume(), n.volume()
	v.mustPublish()
	v.mustPublish()
	w.mustPublish()
	missing := n.volume(attrs{"connector.name": "none"})
	missing.mustRefuse(codes.NotFound)
	n.volume(attrs{"connector.name": "Bad"}).mustRefuse(codes.InvalidArgument)
	failing := n.volume()
	n.api.put(gitClassOf("a", "{{ .missing }}"))
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
	unanswered := `connectors_csi_api_requests_total{resource="connectors",verb="get",code="none"}`
	if got := n.readMetrics()[unanswered]; got != 1 {
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
	runCommand(cmd)
	return out.String(), errors.String(), cmd.ProcessState.ExitCode()
}

func TestPreview(t *testing.T) {
	t.Parallel()
	git := class("git", configuration("config", ".gitconfig", "{{ .connector.spec.address }} {{ .context.token }}\n"),
		configuration("two", "a", "A", "b", "B\n"),
		configuration("params", "p", "{{ .configurations.x }}"),
		configuration("names", "n", "{{ range .connectors }}{{ .metadata.namespace }}/{{ .name }} {{ end }}"))
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
		{"a list of lists, and other kinds", []object{list(list(git), one), {"kind": "Pod", "metadata": object{"name": "x"}}},
			[]string{"--configuration.names=config"}, "https://one.example.com TOKEN\n"},
		{"several files", []object{git, one}, []string{"--configuration.names=two"}, "==> a <==\nA\n==> b <==\nB\n"},
		{"a token", []object{one, git}, []string{"--configuration.names=config", "--token-file", tokenFile},
			"https://one.example.com the-token\n"},
		{"all Connectors in their order", []object{two, git, one, two}, []string{"--configuration.names=names"},
			"team-b/two team-a/one "},
		{"a Connector of the first one's namespace", []object{two, git, one},
			[]string{"--configuration.names=names", "--connector.name=two"}, "team-b/two "},
		{"a Connector of the Pod's namespace", []object{two, git, one},
			[]string{"--configuration.names=names", "--connector.name=one", "--namespace=team-a"}, "team-a/one "},
		{"Connectors", []object{two, git, one}, []string{"--configuration.names=names", "--connectors=team-a/one"},
			"team-a/one "},
		{"a Connector without a namespace", []object{git, unnamed}, []string{"--configuration.names=names"},
			"default/unnamed "},
		{"and with the Pod's", []object{git, unnamed}, []string{"--configuration.names=names", "--namespace=team-c"},
			"team-c/unnamed "},
		{"the longest names", []object{git, long}, []string{"--configuration.names=names"}, longNamespace + "/" + longName +
			" "},
		{"parameters", []object{git, one}, []string{"--configuration.names=params",
			`--configuration.params={"params":{"x":"y"}}`}, "y"},
		{"built-in files", []object{git, one}, []string{"--builtin-files",
			"--configuration.names=!.curlrc,!.env,!connector.status.proxyAddress,!http.proxy,!https.proxy"}, "TOKEN"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if stdout, stderr, code := runRender(t, c.objects, c.arguments...); stdout != c.stdout || stderr != "" || code != 0 {
				t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
			}
		})
	}

	dir := filepath.Join(t.TempDir(), "new")
	if stdout, stderr, code := runRender(t, []object{git, one}, "--configuration.names=two", "--output-dir",
		dir); stdout+stderr != "" || code != 0 {
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
		{"no class", []object{one}, []string{"--configuration.names=config"},
			`ConnectorClass "git" of Connector "team-a/one" cannot be read: it is not in the input`},
		{"another Connector", []object{git, one}, []string{"--configuration.names=config", "--connector.name=none"},
			`Connector "team-a/none" cannot be read: it is not in the input`},
		{"no name", []object{git, {"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "Connector", "metadata": object{}}},
			[]string{"--configuration.names=config"}, "a Connector on standard input has no metadata.name"},
		{"no configuration", []object{git, one}, nil, "configuration.names is missing"},
		{"an attribute too much", []object{git, one},
			[]string{"--configuration.names=config", "--connectors=a", "--connector.name=b"}, "cannot be combined"},
		{"an argument too much", []object{git, one}, []string{"--configuration.names=config", "more"},
			`unexpected argument "more"`},
		{"an empty token", []object{git, one}, []string{"--configuration.names=config", "--token-file=/dev/null"},
			"there is no token in /dev/null"},
	} {
		t.Run(c.what, func(t *testing.T) {
			if stdout, stderr, code := runRender(t, c.objects, c.arguments...); !strings.HasPrefix(stderr, "connectors-csi: ") ||
				!strings.Contains(stderr, c.stderr) || stdout != "" || code != 1 {
				t.Errorf("exit code %d, %q, and on standard error %q", code, stdout, stderr)
			}
		})
	}
}

// The command says what a Pod's events would say.
func TestPreviewRefusesAsAPublishDoes(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for what, change := range sorted(map[string]struct{ class, connector object }{
		"a missing value":  {gitClassOf("a", "x\n{{ .connector.spec.typo }}"), connector("default", "git", "git")},
		"no configuration": {class("git", configuration("other")), connector("default", "git", "git")},
		"too much memory":  {gitClassOf("a", `{{ repeat 1000000000 "x" }}`), connector("default", "git", "git")},
		"an address":       {gitClass(), connector("default", "git", "git", with("a b", "spec", "address"))},
		"an audience": {gitClass(), connector("default", "git", "git",
			with("vault", "status", "proxy", "httpAddress", "audience"))},
		"no class name":     {gitClass(), connector("default", "git", "")},
		"too large":         {gitClass(), connector("default", "git", "git", padded(4<<20))},
		"a bad file name":   {gitClassOf("../a", "x"), connector("default", "git", "git")},
		"a large volume":    {gitClassOf("a", `{{ repeat 1048577 "x" }}`), connector("default", "git", "git")},
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
	t.Parallel()
	git, one := class("git", configuration("config", "a", "A"),
		configuration("large", "a", `{{ repeat 1000000000 "x" }}`)), connector("default", "one", "git")
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
	if _, stderr, code := preview("large"); !strings.Contains(stderr, "rendering it takes more than 64 MiB of memory") ||
		code != 1 {
		t.Errorf("exit code %d, and on standard error %q", code, stderr)
	}
}

func TestVersionAndHelp(t *testing.T) {
	t.Parallel()
	run := func(argument ...string) string {
		cmd := exec.Command(rendererBinary(), argument...)
		cmd.Env = []string{roleKey + "=" + roleDriver}
		out, _ := runCommand(cmd)
		return out
	}
	if got := run("--version"); got != "dev\n" {
		t.Errorf("--version prints %q", got)
	}
	for _, want := range []string{"connectors-csi [flags]", "connectors-csi render [flags]", "-kubelet-dir"} {
		if got := run("--help"); !strings.Contains(got, want) {
			t.Errorf("--help does not say %q: %s", want, got)
		}
	}
	for _, want := range []string{"-configuration.names", "-connectors", "-namespace", "-token-file", "-output-dir",
		"-builtin-files", "-check"} {
		if got := run("render", "--help"); !strings.Contains(got, want) {
			t.Errorf("render --help does not say %q: %s", want, got)
		}
	}
}
