package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// ---- Requests: the next place goes to the namespace with the fewest ----

// Answers to a tenant's eighteen namespaces come only when the test lets them, one at a time. A neighbour's read gets
// the first place that is given back, since every namespace of the tenant that waits has a request under way.
func TestNextRequestIsTheNeighbours(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	answer, asked := make(chan bool), make(chan string, 1000)
	n.api.set(func() {
		n.api.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			if strings.Contains(r.URL.Path, "/connectors/") && !r.URL.Query().Has("watch") {
				namespace := strings.Split(r.URL.Path, "/")[5]
				asked <- namespace
				if namespace != "neighbour" {
					select {
					case <-answer:
					case <-r.Context().Done():
					}
				}
			}
			return false
		}
	})
	var all sync.WaitGroup
	read := func(namespace string) {
		n.api.put(connector(namespace, "git", "git"))
		pod := n.pod(namespace + "/default")
		all.Go(func() {
			l := n.driver.kube.begin(&lookup{pod: podIdentity{namespace: namespace, serviceAccount: "default"}, token: pod.token,
				first: true})
			defer l.end()
			if _, err := l.connector(t.Context(), reference{namespace, "git"}); err != nil {
				t.Error(err)
			}
		})
	}
	waiting := func(count int) {
		t.Helper()
		awaitTurns(t, n.driver.kube.requests, count)
	}
	for i := range 16 { // every place is taken
		read(fmt.Sprint("tenant-", i))
		eventually(t, "it asks", func() bool { return len(asked) == i+1 })
	}
	for i := range 3 * 16 {
		read(fmt.Sprint("tenant-", i%16))
	}
	waiting(3 * 16)
	n.api.put(connector("neighbour", "git", "git"))
	done := make(chan error)
	go func() { done <- n.pod("neighbour/default").volume("config").publish() }()
	waiting(3*16 + 1)
	for range 16 {
		<-asked
	}
	answer <- true // one of them
	if next := <-asked; next != "neighbour" {
		t.Errorf("the next place is for %s", next)
		close(answer)
	}
	must(t, <-done) // while all others wait
	if !t.Failed() {
		close(answer)
	}
	all.Wait()
}

// With eighteen namespaces that each want all they can get, whoever comes last is behind one request of each at most.
func TestTenantOfManyNamespaces(t *testing.T) {
	t.Parallel()
	q := newRequestQueue(maxRequests)
	served := make(chan *ticket)
	ask := func(namespace string, waiting int) {
		go func() {
			turn := &ticket{namespace: namespace}
			if err := q.acquire(t.Context(), turn); err != nil {
				t.Error(err)
			}
			served <- turn
		}()
		awaitTurns(t, q, waiting) // it waits or is served
	}
	var under []*ticket
	for i := range 18 * maxNamespaceRequests { // one namespace after the other, which is the worst order
		ask(fmt.Sprint("tenant-", i/maxNamespaceRequests), max(0, i+1-maxRequests))
		if i < maxRequests {
			under = append(under, <-served)
		}
	}
	ask("neighbour", 18*maxNamespaceRequests-maxRequests+1)
	answers := 0
	for next := (*ticket)(nil); next == nil || next.namespace != "neighbour"; answers++ {
		q.release(under[0])
		next = <-served
		under = append(under[1:], next)
	}
	// Four namespaces had all places: the other fourteen, with nothing under way as well, have waited longer.
	if answers > 15 {
		t.Errorf("the neighbour has waited for %d answers", answers)
	}
	for _, turn := range under {
		q.release(turn)
	}
	for range 18*maxNamespaceRequests - maxRequests - answers + 1 {
		q.release(<-served)
	}
	if len(q.active) != 0 || len(q.waiting) != 0 {
		t.Errorf("%d have a place, %d wait", len(q.active), len(q.waiting))
	}
}

// Whoever gives up at the very moment at which a place is granted gives it back.
func TestQueueLosesNoPlace(t *testing.T) {
	t.Parallel()
	q := newRequestQueue(2)
	var all sync.WaitGroup
	for i := range 64 {
		all.Go(func() {
			for round := range 200 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(round%7)*10*time.Microsecond)
				turn := &ticket{namespace: fmt.Sprint(i % 5)}
				if err := q.acquire(ctx, turn); err == nil {
					q.release(turn)
				} else if !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	all.Wait()
	if len(q.active) != 0 || len(q.waiting) != 0 {
		t.Errorf("%d have a place, %d wait", len(q.active), len(q.waiting))
	}
}

// ---- Renderers: what is cheap, what is known ----

// setOutcome makes the renderers believe that whatever they have rendered took so long.
func setOutcomes(p *renderers, change func(*outcome)) {
	changeRenderers(p, func() {
		for what, o := range p.outcomes {
			change(&o)
			p.outcomes[what] = o
		}
	})
}

// What is let in for being cheap, and is not, is ended after ten times what it took before, and not let in again.
func TestCheapThatIsNot(t *testing.T) {
	n := startNode(t)
	n.api.put(gitClassOf("file", "{{ range 3000000 }}{{ end }}"), class("good", configuration("config", "file", "x")),
		connector("default", "good", "good"))
	p := n.driver.renderers
	good := n.volume(attrs{"connector.name": "good"})
	good.mustPublish()
	changeRenderers(p, func() {
		p.accounts["default"] = &account{left: -time.Minute, at: time.Now(), most: time.Minute, mostBy: "what the test says"}
	})
	v := n.volume()
	v.mustRefuse(codes.ResourceExhausted, "has used up", "what the test says") // it is unknown
	changeRenderers(p, func() { delete(p.accounts, "default") })
	v.mustPublish() // it takes some tenths of a second
	setOutcomes(p, func(o *outcome) { o.allowance = minAllowance })
	changeRenderers(p, func() {
		p.accounts["default"] = &account{left: -time.Minute, at: time.Now(), most: time.Minute, mostBy: "what the test says"}
	})
	other := n.volume()
	other.mustRefuse(codes.ResourceExhausted,
		`ConnectorClass "git", configuration "config", file "file": rendering it takes more than the 20ms of processor time`,
		"while its namespace has used up its own")
	other.mustRefuse(codes.ResourceExhausted, "has used up its 10s", "what the test says")
	good.pod.renewToken()
	good.mustPublish() // in a renderer that was started for it
	if left := p.left("default"); left > -time.Minute+time.Second || left < -time.Minute-time.Second {
		t.Errorf("the account holds %v", left)
	}
}

// A turn that has its place when the account becomes empty, or its job is no longer known to be cheap, has what it was
// let in for.
func TestAccountBecomesEmptyBetweenPlaceAndRenderer(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	p := n.driver.renderers
	turn := &ticket{namespace: "default", key: [32]byte{1}}
	must(t, p.acquire(t.Context(), turn))
	defer p.release(turn)
	changeRenderers(p, func() { p.accounts["default"] = &account{left: -time.Minute, at: time.Now()} })
	r, most, err := p.obtain(turn)
	must(t, err)
	defer r.end()
	if most != renderProcessorTime {
		t.Errorf("it may have %v", most)
	}
}

// The limit of wall time, which a busy node causes, is not remembered; what hit it is not known to be cheap either.
func TestWallTimeIsNotRemembered(t *testing.T) {
	t.Parallel()
	i := slices.IndexFunc(impostors(), func(i impostor) bool { return i.what == "steps without an answer" })
	n := renderedBy(t, fmt.Sprint("impostor-", i))
	v := n.volume()
	if err := v.publish(); err == nil || !strings.Contains(err.Error(), "takes more than 5s") &&
		!strings.Contains(err.Error(), "too busy") {
		t.Fatal(err)
	}
	p := n.driver.renderers
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.outcomes) != 1 {
		t.Errorf("%d outcomes", len(p.outcomes))
	}
	for _, o := range p.outcomes {
		if o.limit != nil || o.allowance != 0 {
			t.Errorf("%+v is remembered", o)
		}
	}
}

// What is remembered is one thing for all Pods of a namespace, whatever their tokens and groups, and another with any
// other attribute, or version of an object.
func TestDigestOfAJob(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	digests := map[[32]byte]string{}
	digest := func(v *podVolume, gid int, connector, class string) [32]byte {
		t.Helper()
		p, err := n.driver.validate(v.request())
		must(t, err)
		p.attributes, err = n.driver.attributesFor(&volume{}, v.request(), p.pod.namespace)
		must(t, err)
		p.permissions.gid = gid
		return inputsDigest(p, []source{{&apiObject{version: connector}, &apiObject{version: class}}})
	}
	first := digest(n.volume(), 0, "1", "2")
	if digest(n.volume(), 7, "1", "2") != first {
		t.Error("another Pod with another token and group makes another digest")
	}
	digests[first] = "the first"
	for what, other := range sorted(map[string][32]byte{
		"Connector":     digest(n.volume(), 0, "3", "2"),
		"class":         digest(n.volume(), 0, "1", "3"),
		"both":          digest(n.volume(), 0, "2", "1"),
		"together":      digest(n.volume(), 0, "1\" \"2", ""),
		"namespace":     digest(n.pod("other/default").volume("config"), 0, "1", "2"),
		"configuration": digest(n.volume(attrs{"configuration.names": "config,x"}), 0, "1", "2"),
		"exclusion":     digest(n.volume(attrs{"configuration.names": "config,!x"}), 0, "1", "2"),
		"params":        digest(n.volume(attrs{"configuration.params": `{"config":{"a":"b"}}`}), 0, "1", "2"),
		"expiration":    digest(n.volume(attrs{"token.expiration": "1h"}), 0, "1", "2"),
		"name":          digest(n.volume(attrs{"connector.name": "gi", "connector.namespace": "t"}), 0, "1", "2"),
		"names":         digest(n.volume(attrs{"connector.name": "-", "connectors": "git"}), 0, "1", "2"),
	}) {
		if same := digests[other]; same != "" {
			t.Errorf("%s is the same as %s", what, same)
		}
		digests[other] = what
	}
}

// ---- What is kept of volumes for pushes ----

// withParams are attributes of so many bytes.
func withParams(bytes int) attrs {
	text, _ := json.Marshal(object{"config": object{"p": strings.Repeat("x", bytes)}})
	return attrs{"configuration.params": string(text)}
}

// kept is what the driver keeps of volumes, of the Pod's or of all (""); it is the sum of what it keeps of each.
func (n *node) kept(pod string) (bytes int) {
	sum := 0
	n.eachVolume(func(v *volume) {
		if pod == "" || v.memory.pod == pod {
			sum += v.kept
		}
	})
	n.driver.mu.Lock()
	defer n.driver.mu.Unlock()
	if bytes = n.driver.kept[pod]; bytes != sum {
		n.t.Errorf("%d bytes are kept, and %d counted", sum, bytes)
	}
	return bytes
}

// Of a Pod's sixteen volumes of 30 KB three are kept. The others are refreshed by calls, and kept when there is room.
func TestKeptOfAPodIsBounded(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	declared := configuration("config", "address", "{{ .connector.spec.address }}", "token", "{{ .context.token }}")
	declared["params"] = []any{param("p", "default", "")}
	n.api.put(class("git", declared))
	pod := n.pod()
	var volumes []*podVolume
	for i := range maxPodVolumes {
		volumes = append(volumes, pod.volume(fmt.Sprint("v", i), withParams(30<<10)))
		volumes[i].settle()
	}
	other := n.pod("default/builder").volume("config")
	other.settle() // of another Pod, of another ServiceAccount
	n.awaitWatches(3)
	if kept := n.kept(pod.uid); kept > maxPodKeptBytes || kept < maxPodKeptBytes*2/3 {
		t.Errorf("%d bytes are kept of the Pod", kept)
	}
	isKept := func(v *podVolume) bool { return v.record().publication != nil }
	kept, beyond := volumes[:4], volumes[4:]
	for i, v := range volumes {
		if got := isKept(v); got != (i < 4) {
			t.Errorf("volume %d is kept: %v", i, got)
		}
	}
	n.api.put(moved("git", "first"))
	for _, v := range kept {
		v.await("address", "https://first")
	}
	for _, v := range beyond {
		v.want("address", "https://git.example.com")
		pod.renewToken()
		v.mustPublish()
		v.want("address", "https://first")
		v.want("token", pod.token)
	}

	// One that is kept and grows is so no more, and neither pushed nor watched.
	large := kept[0]
	pod.token = issue(pod.namespace, pod.serviceAccount,
		map[string]string{"name": pod.name, "uid": pod.uid, "x": strings.Repeat("x", 8<<10)}, time.Hour, apiAudience)
	large.mustPublish()
	if isKept(large) || len(large.record().subscriber.entries) != 0 {
		t.Errorf("a volume beyond the bound is kept: %v, with %d objects", isKept(large),
			len(large.record().subscriber.entries))
	}
	pod.renewToken()
	for _, v := range kept[1:] {
		v.mustUnpublish()
	}
	for _, v := range beyond[:3] {
		v.mustPublish()
		if !isKept(v) {
			t.Error("it is not kept, though there is room")
		}
	}
	n.api.put(moved("git", "second"))
	for _, v := range beyond[:3] {
		v.await("address", "https://second")
	}
	for _, v := range append(volumes[:1], beyond...) {
		v.mustUnpublish()
	}
	other.mustUnpublish()
	n.wantForgotten()
	if len(n.driver.kept) != 1 || n.kept("") != 0 {
		t.Errorf("%v is kept of no volumes", n.driver.kept)
	}
}

// The node's bound holds for all Pods together, and one Pod that goes makes room for another.
func TestKeptOfANodeIsBounded(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	first := n.volume()
	first.settle()
	n.locked(func() { n.driver.kept[""] += maxKeptBytes }) // as others do
	v := n.volume()
	v.settle()
	if v.record().publication != nil {
		t.Error("it is kept")
	}
	n.locked(func() { n.driver.kept[""] -= maxKeptBytes })
	v.mustPublish()
	if v.record().publication == nil {
		t.Error("it is not kept, though there is room")
	}
	n.kept("")
}

// A full node of volumes with the largest attributes takes little more of the process's heap than what may be kept.
// What a round of refreshes that change nothing costs is said.
func TestFullNodeOfLargeAttributes(t *testing.T) {
	n := startNode(t)
	declared := configuration("config", "token", "{{ .context.token }}")
	declared["params"] = []any{param("p", "default", "")}
	n.api.put(class("git", declared))
	var volumes []*podVolume
	for range 110 {
		pod := n.pod()
		for i := range times(4, maxPodVolumes) {
			v := pod.volume(fmt.Sprint("v", i))
			v.change = func(r *csi.NodePublishVolumeRequest) { // made for each call, so that the test keeps none
				r.VolumeContext["configuration.params"] = withParams(32000)["configuration.params"]
			}
			volumes = append(volumes, v)
		}
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	processor := func() time.Duration {
		var u unix.Rusage
		must(t, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	before := heap()
	for _, v := range volumes {
		must(t, v.publish())
	}
	after, used := heap(), processor()
	for _, v := range volumes {
		must(t, v.publish())
	}
	used = processor() - used
	kept := 0
	n.eachVolume(func(v *volume) {
		if v.publication != nil {
			kept++
		}
	})
	t.Logf("%d volumes, of which %d are kept, take %d MiB; an unchanged round takes %v of processor time, with the "+
		"test's own",
		len(volumes), kept, (after-before)>>20, used.Round(10*time.Millisecond))
	if after > before+2*maxKeptBytes || n.kept("") > maxKeptBytes || kept < 200 {
		t.Errorf("%d volumes are kept, in %d MiB", kept, (after-before)>>20)
	}
}

// ---- The mount table ----

// A file system of the node that does not answer, as one of a server that is down, does not keep the driver from
// starting.
func TestDeadFileSystemElsewhere(t *testing.T) {
	n := newNode(t)
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("no file system can be served here: ", err)
	}
	dir := filepath.Join(n.dir, "dead")
	must(t, os.Mkdir(dir, 0o755))
	if err := unix.Mount("server:/dead", dir, "fuse", 0,
		fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse)); err != nil {
		t.Skip("no file system can be served here: ", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	defer unix.Close(fuse) // which lets go of whoever waits
	v := n.volume()
	mustMount(t, v.target, files{"a": nil}, permissions{mode: defaultMode})
	n.startProcess()
	if got := n.readMetrics()["connectors_csi_volumes"]; got != 1 {
		t.Errorf("%v volumes", got)
	}
	v.mustPublish()
}
