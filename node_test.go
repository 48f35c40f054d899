package main

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

// node is one node of a cluster: kubelet's directory, the API server, and a driver once it is started.
type node struct {
	t      testing.TB
	dir    string // kubelet's --root-dir
	api    *apiServer
	driver *driver // where it runs in this process
	stop   func()  // ends that driver as SIGTERM does, and waits for it
	conn   *grpc.ClientConn
	http   string       // the address of /healthz and so on
	log    lockedBuffer // of all its drivers
}

var nodes atomic.Int32

// newNode makes a node without a driver. Its API server has the ConnectorClass "git" and the Connector "git".
func newNode(t testing.TB) *node {
	n := &node{t: t, dir: fmt.Sprintf("%s/%d", kubeletRoot, nodes.Add(1)), api: newAPIServer(t)}
	for _, dir := range []string{n.podsDir(), n.dir + "/plugins_registry", n.serviceAccount()} {
		must(t, os.MkdirAll(dir, 0o750))
	}
	must(t, writeServiceAccount(n.serviceAccount(), n.api.Server))
	n.api.put(gitClass(), connector("default", "git", "git"))
	t.Cleanup(func() {
		for _, m := range mountsBelow(n.dir) {
			unix.Unmount(m.point, unix.MNT_DETACH)
		}
		if secret := secretIn(n.log.String()); secret != "" {
			t.Errorf("the log contains %s", secret)
		}
		if t.Failed() && testing.Verbose() {
			t.Log(n.log.String())
		}
	})
	return n
}

// logFromNow returns what returns the part of the log that begins now.
func (n *node) logFromNow() (text func() string) {
	begin := len(n.log.String())
	return func() string { return n.log.String()[begin:] }
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
	d, err := newDriver(driverConfig{nodeName: "node-1", podsDir: n.podsDir(), volumesBudget: 240 << 20,
		binary: rendererBinary(), log: slog.New(slog.NewTextHandler(&n.log, nil)),
		api: kubeConfig{server: n.api.URL, directory: n.serviceAccount(), refresh: time.Hour}})
	must(n.t, err)
	n.driver = d
	for _, c := range change {
		c(n.driver)
	}
	log := n.logFromNow()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- serve(ctx, n.driver, n.socket(), "127.0.0.1:0") }()
	n.stop = sync.OnceFunc(func() {
		n.conn.Close()
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("serve: %v", err)
		}
		d.kube.client.CloseIdleConnections()
	})
	n.dial()
	n.http = n.awaitStart(log)
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
	if out, err := runCommand(build); err != nil {
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
	check := func(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
		options ...grpc.CallOption) error {
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
		called := 0
		n.eachVolume(func(v *volume) {
			if v.called {
				called++
			}
		})
		return called == count
	})
}

// locked does something with the driver's records of volumes and with its cache, while the driver does not.
func (n *node) locked(do func()) {
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	n.driver.kube.mu.Lock()
	defer n.driver.kube.mu.Unlock()
	do()
}

// eachVolume looks at what the driver knows of each volume.
func (n *node) eachVolume(look func(*volume)) {
	n.locked(func() {
		for _, v := range n.driver.volumes {
			look(v)
		}
	})
}

// record is what the driver knows of the volume, or nil. The caller calls nothing meanwhile.
func (v *podVolume) record() (found *volume) {
	v.node.eachVolume(func(r *volume) {
		if r.target == v.target {
			found = r
		}
	})
	return found
}

// eachEntry looks at all entries of the driver's cache.
func (n *node) eachEntry(look func(*entry)) {
	n.locked(func() {
		for e := range n.driver.kube.allEntries {
			look(e)
		}
	})
}

// forgetUnmounted lets the driver look for volumes that somebody else has unmounted, as it does from time to time.
func (n *node) forgetUnmounted() { n.driver.forgetUnmounted() }

// sweep removes old files of a volume, as a timer does a second after an update.
func (n *node) sweep(v *volume) { n.driver.inTurn(v, func(context.Context) { n.driver.sweep(v) }) }

// endRenderers ends the renderers that have nothing to do.
func (n *node) endRenderers() { n.driver.renderers.close() }

// pinned is how many volumes are counted that are unmounted, since somebody has their old files open.
func (n *node) pinned() int { return len(n.driver.budget.pinned) }

// awaitNothingPinned waits until the driver finds that nobody has old files open. What this process has closed, a child
// that another test starts meanwhile has open until it runs its own program.
func (n *node) awaitNothingPinned() {
	n.t.Helper()
	eventually(n.t, "nothing is pinned", func() bool { n.forgetUnmounted(); return n.pinned() == 0 })
}

func (n *node) podsDir() string { return n.dir + "/pods" }

// serviceAccount is the directory of the driver's token and CA, where it runs in this process.
func (n *node) serviceAccount() string { return n.dir + "/serviceaccount" }

func (n *node) socket() string { return n.dir + "/plugins_registry/connectors-csi-reg.sock" }

// age makes every object in the driver's cache an hour older, which is its refresh interval, for startPolling.
func (n *node) age() {
	n.eachEntry(func(e *entry) {
		e.read = e.read.Add(-n.driver.kube.refresh)
		if e.watch != nil {
			e.watch.ended = e.watch.ended.Add(-n.driver.kube.refresh)
		}
	})
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
	p.Env = append(os.Environ(), roleKey+"="+roleDriver, "NODE_NAME=node-1", "KUBERNETES_SERVICE_HOST="+host,
		"KUBERNETES_SERVICE_PORT="+port)
	p.Env = append(p.Env, "GOMEMLIMIT=48MiB") // as deploy.yaml has it
	p.Env = append(p.Env, environment...)
	p.Stderr = io.MultiWriter(p.log, &n.log)
	p.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(n.t, startCommand(p.Cmd))
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
	p := &testPod{node: n, namespace: "default", serviceAccount: "default", name: fmt.Sprintf("pod-%d", i),
		uid: fmt.Sprintf("0f5e7ed5-0000-4000-8000-%012d", i)}
	for _, s := range serviceAccount {
		p.namespace, p.serviceAccount, _ = strings.Cut(s, "/")
	}
	n.api.set(func() { n.api.podUIDs[p.uid] = true })
	p.renewToken()
	return p
}

// renewToken gives the Pod a new token, as kubelet does when the old one is about to expire.
func (p *testPod) renewToken() {
	p.token = issue(p.namespace, p.serviceAccount, map[string]string{"name": p.name, "uid": p.uid}, 30*time.Minute,
		apiAudience)
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
	v := &podVolume{t: p.node.t, node: p.node, pod: p,
		attributes: attrs{"connector.name": "git", "configuration.names": "config"}}
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
	_, err := csi.NewNodeClient(v.node.conn).NodeUnpublishVolume(context.Background(),
		&csi.NodeUnpublishVolumeRequest{VolumeId: v.request().VolumeId, TargetPath: v.target})
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

// mustRefuse publishes a volume that is not published, which has to fail with the code and the words and to leave
// nothing.
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

// unchangedFromNow returns what fails the test if a file has changed since, or the same files were written again.
func (v *podVolume) unchangedFromNow() (want func()) {
	v.t.Helper()
	files, generation := v.read(), v.generation()
	return func() {
		v.t.Helper()
		if !maps.Equal(v.read(), files) {
			v.t.Error("the files have changed")
		} else if v.generation() != generation {
			v.t.Error("what was there already was written again")
		}
	}
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
	return object{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "ConnectorClass",
		"metadata": object{"name": name}, "spec": object{"configurations": list}}
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

// certificate makes one with that subject, always the same, in PEM.
func certificate(subject string) string {
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: subject}}
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// gitClassOf makes the class "git" with one configuration, "config", of these file names and templates in turn.
func gitClassOf(data ...string) object {
	return class("git", configuration("config", data...))
}

func gitClass() object {
	return class("git",
		configuration("config",
			".gitconfig",
			"[http]\n\textraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n[url \"{{ "+
				".connector.status.proxyAddress }}\"]\n\tinsteadOf = {{ .connector.spec.address }}\n",
			"token", "{{ .context.token }}",
			"mark", "{{ .connector.metadata.annotations.mark }}"),
		configuration("first", "shared", "from first", "one", "1"),
		configuration("second", "shared", "from second", "two", "2"))
}
