// Package soak is a stretch of bad days on the real node: the command soak, and a test.
package soak

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/node"
)

// A soak has four steps:
//
//  1. install the driver with a small budget for volumes, then what Pods mount
//  2. let Pods, Connectors, classes and RoleBindings change while processes are killed and stopped, as the plan says
//  3. wait until everything is back: then every Pod has to run with the newest files
//  4. delete all Pods: nothing of them may be left
//
// From 1 to 4 a watch (watch.go) reads all volumes and logs, and keeps whatever is wrong.
type soak struct {
	node  *node.Node
	watch *watch

	mu        sync.Mutex
	addresses map[string]string // that Connectors have now
	revisions map[string]int    // and classes
	ballast   bool              // whether the renderers of large Pods need much memory
	pods      map[string]pod    // that are to run, by namespace/name
	counts    map[string]int    // of events, by what they are
	worst     map[string]time.Duration
}

const (
	settleLimit   = 2 * time.Minute // until files are the newest
	goneLimit     = time.Minute     // until nothing is left of a deleted Pod
	backLimit     = 6 * time.Minute // kubelet waits up to five minutes before it starts a container again
	volumesBudget = "10"            // in MiB: about ten of the large Pods
)

var podNamespaces = []string{"soak-1", "soak-2"} // the Connectors are in the first

// pod is one of the soak's. Its shape says what is special about it.
type pod struct {
	namespace, name, shape string
	class                  string
	connectors             []string
}

var podShapes = map[string]struct{ fields, mount, attributes string }{
	"plain":      {},
	"hour":       {attributes: ", token.expiration: 1h"},
	"group":      {fields: "securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}"},
	"subpath":    {mount: "\n    - {name: volume, mountPath: /first, subPath: first}"},
	"user-space": {fields: "hostUsers: false"},
	"large":      {},
}

func (p pod) manifest() string {
	shape := podShapes[p.shape]
	var connectors []string
	for _, name := range p.connectors {
		connectors = append(connectors, podNamespaces[0]+"/"+name)
	}
	manifest := cluster.PodManifest(p.name, fmt.Sprintf(`{connectors: "%s", configuration.names: config%s}`,
		strings.Join(connectors, ","), shape.attributes), shape.fields)
	const name, mount = "metadata: {", "mountPath: /volume}"
	return strings.NewReplacer(name, name+"namespace: "+p.namespace+", ", mount, mount+shape.mount).Replace(manifest)
}

// classManifest is a class of which every file begins and ends with the same line: its revision, the Connectors'
// addresses and the token. The name of one file tells the revision as well. With ballast its rendering takes most of
// the memory that a renderer may have.
func classManifest(name string, revision int, ballast bool) string {
	const line = `revision-%d{{ range .connectors }} {{ .spec.address }}{{ end }} {{ .context.token }}`
	size := 100
	if name == "large" {
		size = 900_000
	}
	fill := ""
	if ballast {
		fill = `{{ $ballast := repeat 45000000 "y" }}`
	}
	text := fmt.Sprintf(fill+line+`\n{{ repeat %d "x" }}\n`+line+`\n`, revision, size, revision)
	return fmt.Sprintf(`
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata: {name: soak-%s}
spec: {configurations: [{name: config, data: {first: %q, revision-%d: %q}}]}
`, name, strings.ReplaceAll(text, `\n`, "\n"), revision, strings.ReplaceAll(fmt.Sprintf(line+`\n`, revision), `\n`, "\n"))
}

func connectorManifest(name, class, address string) string {
	return fmt.Sprintf(`
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata: {name: %s, namespace: %s}
spec: {connectorClassName: soak-%s, address: %q}
`, name, podNamespaces[0], class, address)
}

// classOfConnector has the class of each.
var classOfConnector = map[string]string{"a-1": "a", "a-2": "a", "b-1": "b", "large": "large"}

// event is something that the plan does at a time.
type event struct {
	at   time.Duration
	what string // for the summary
	on   string
	do   func(*soak) error
}

// plan makes all events up front, so that a seed repeats their order: changes by way of the API server, one after the
// other, and faults beside them.
func plan(seed uint64, duration time.Duration) (changes, faults []event) {
	random := rand.New(rand.NewPCG(seed, 0))
	pick := func(from []string) string { return from[random.IntN(len(from))] }
	between := func(least, most time.Duration) time.Duration {
		return least + time.Duration(random.Int64N(int64(most-least)))
	}
	connectors := slices.Sorted(maps.Keys(classOfConnector))
	shapes := slices.DeleteFunc(slices.Sorted(maps.Keys(podShapes)), func(shape string) bool { return shape == "large" })

	var pods []pod
	number, revision := 0, map[string]int{}
	next := func(shape string) pod {
		number++
		p := pod{pick(podNamespaces), fmt.Sprintf("%s-%d", shape, number), shape, "a", []string{"a-1", "a-2"}}
		switch {
		case shape == "large":
			p.class, p.connectors = "large", []string{"large"}
		case random.IntN(2) == 0:
			p.class, p.connectors = "b", []string{"b-1"}
		}
		return p
	}
	add := func(at time.Duration, what, on string, do func(*soak) error) {
		changes = append(changes, event{at, what, on, do})
	}
	create := func(at time.Duration, shape string) {
		p := next(shape)
		pods = append(pods, p)
		add(at, "create a Pod", p.name, func(s *soak) error { return s.create(p) })
	}
	flood := func(at time.Duration, count int) {
		var large []pod
		for range count {
			large = append(large, next("large"))
		}
		add(at, "other large Pods", fmt.Sprint(count), func(s *soak) error { return s.flood(large) })
	}
	for _, shape := range shapes { // one of each at once
		create(0, shape)
	}
	flood(0, 4)
	rolledBack, upgraded := false, false
	for at := between(0, 2*time.Second); at < duration; at += between(time.Second, 4*time.Second) {
		if !rolledBack && at > duration/3 {
			rolledBack = true
			add(at, "roll the driver back", cluster.OldCommit, (*soak).rollback)
		} else if !upgraded && at > duration/2 {
			upgraded = true
			add(at, "upgrade the driver", "", (*soak).install)
		}
		switch choice := random.IntN(20); {
		case choice < 4 && len(pods) < 12, len(pods) < 4:
			create(at, pick(shapes))
		case choice < 7:
			i := random.IntN(len(pods))
			p := pods[i]
			pods = slices.Delete(pods, i, i+1)
			add(at, "delete a Pod", p.name, func(s *soak) error { return s.remove(p) })
		case choice < 13:
			connector := pick(connectors)
			number++
			address := fmt.Sprintf("https://address-%d.example.com", number)
			add(at, "change a Connector", connector, func(s *soak) error { return s.setAddress(connector, address, false) })
		case choice < 14:
			connector := pick(connectors)
			number++
			address := fmt.Sprintf("https://address-%d.example.com", number)
			add(at, "replace a Connector", connector, func(s *soak) error { return s.setAddress(connector, address, true) })
		case choice < 17:
			class := classOfConnector[pick(connectors)]
			revision[class]++
			r := revision[class] + 1
			add(at, "change a class", class, func(s *soak) error { return s.setClass(class, r) })
		case choice < 19:
			namespace := pick(podNamespaces)
			add(at, "withdraw a RoleBinding", namespace, func(s *soak) error { return s.withdraw(namespace) })
			add(at+between(time.Second, 10*time.Second), "grant it again", namespace,
				func(s *soak) error { return s.grant(namespace) })
		default:
			flood(at, 2+random.IntN(12))
		}
	}
	flood(duration, 6) // which the budget has room for
	for _, namespace := range podNamespaces {
		add(duration+10*time.Second, "grant it again", namespace, func(s *soak) error { return s.grant(namespace) })
	}
	slices.SortStableFunc(changes, func(a, b event) int { return int(a.at - b.at) })

	// Kubelet waits longer each time before it starts a container again, but not the first one of a new Pod.
	deaths, free := 0, map[string]time.Duration{}
	for at := between(5*time.Second, 8*time.Second); at < duration; at += between(3*time.Second, 8*time.Second) {
		target := pick([]string{"driver", "renderer", "kubelet", "shim", "API server"})
		kill, lasts := random.IntN(2) == 0, between(time.Second, 8*time.Second)
		if free[target] > at {
			continue
		}
		free[target] = at + lasts + 5*time.Second
		if kill && (target == "driver" || target == "shim") {
			if deaths++; deaths > 2 {
				deaths = 0
				faults = append(faults, event{at, "replace the driver's Pod", "", func(*soak) error {
					return change("", "--namespace=connectors-system", "delete", "pods", driverPods, "--wait=false")
				}})
				continue
			}
		}
		verb := map[bool]string{true: "kill ", false: "stop "}[kill] + target
		faults = append(faults, event{at, verb, lasts.Round(time.Millisecond).String(), func(s *soak) error {
			return s.fault(target, kill, lasts)
		}})
	}
	return changes, faults
}

// Run is the command. The seed 0 stands for a random one.
func Run(n *node.Node, duration time.Duration, seed uint64) error {
	if seed == 0 {
		seed = rand.Uint64()
	}
	fmt.Printf("soak of %v, repeat it with: go -C e2e run . soak --duration %v --seed %d\n", duration, duration, seed)
	s := &soak{
		node: n, addresses: map[string]string{}, revisions: map[string]int{}, ballast: true, pods: map[string]pod{},
		counts: map[string]int{}, worst: map[string]time.Duration{},
	}
	s.watch = newWatch(n)

	// 1. install
	if err := s.prepare(); err != nil {
		return err
	}
	stop := s.watch.start()
	defer stop()

	// 2. change
	began := time.Now()
	changes, faults := plan(seed, duration)
	var running sync.WaitGroup
	running.Go(func() {
		for _, e := range changes {
			time.Sleep(time.Until(began.Add(e.at)))
			s.perform(began, e)
		}
	})
	for _, e := range faults { // each by itself, since they overlap
		running.Go(func() {
			time.Sleep(time.Until(began.Add(e.at)))
			s.perform(began, e)
		})
	}
	running.Wait()

	// 3. settle
	if err := s.back(); err != nil {
		s.watch.wrong("not everything came back: %v", err)
	}
	s.settled()

	// 4. delete
	s.empty()
	stop()
	s.watch.readLogs()
	return s.summary(seed)
}

// perform does what an event says, and reports it.
func (s *soak) perform(began time.Time, e event) {
	fmt.Printf("%7.1f s  %s %s\n", time.Since(began).Seconds(), e.what, e.on)
	if err := e.do(s); err != nil {
		s.watch.wrong("%s %s: %v", e.what, e.on, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[e.what]++
}

const driverPods = "--selector=app.kubernetes.io/name=connectors-csi"

// change asks the API server again and again, since it may be away.
func change(manifest string, args ...string) error {
	return cluster.Await(limitOfChange, func() error {
		_, err := cluster.KubectlStdin(manifest, append(args, "--request-timeout=10s")...)
		return err
	})
}

const limitOfChange = time.Minute

func (s *soak) prepare() error {
	for _, namespace := range podNamespaces {
		if err := change("", "create", "namespace", namespace); err != nil {
			return err
		}
		if _, err := cluster.Kubectl("--namespace", namespace, "wait", "--for=create", "serviceaccount/default",
			"--timeout=60s"); err != nil {
			return err
		}
	}
	if err := s.install(); err != nil {
		return err
	}
	for connector, class := range classOfConnector {
		err := errors.Join(s.setClass(class, 1), s.setAddress(connector, "https://"+connector+".example.com", true))
		if err != nil {
			return err
		}
	}
	for _, namespace := range podNamespaces {
		if err := s.grant(namespace); err != nil {
			return err
		}
	}
	return s.back()
}

// install applies deploy.yaml with less memory for volumes, and a limit that the driver comes near to: of the soak's
// templates two renderers need about 60 MiB each.
func (s *soak) install() error {
	content, err := os.ReadFile("../deploy.yaml")
	if err != nil {
		return err
	}
	manifest, err := cluster.WithArgs(string(content), "--volumes-budget="+volumesBudget)
	if err != nil {
		return err
	}
	smaller := strings.Replace(manifest, "memory: 864Mi", "memory: 240Mi", 1)
	if smaller == manifest {
		return errors.New("deploy.yaml has another memory limit than this was written for")
	}
	return change(smaller, "apply", cluster.Validation(), "-f", "-")
}

// rollback installs the old driver, which has no renderers: what they need would kill it.
func (s *soak) rollback() error {
	s.mu.Lock()
	s.ballast = false
	revision := s.revisions["large"]
	s.mu.Unlock()
	manifest, err := cluster.OldManifest()
	if err := errors.Join(err, s.setClass("large", revision), change("", cluster.ForgetPolicy...)); err != nil {
		return err
	}
	return change(manifest, "apply", cluster.Validation(), "-f", "-")
}

func (s *soak) create(pods ...pod) error {
	var manifests []string
	s.mu.Lock()
	for _, p := range pods {
		manifests = append(manifests, p.manifest())
		s.pods[p.namespace+"/"+p.name] = p
	}
	s.mu.Unlock()
	return change(strings.Join(manifests, "---"), "apply", "-f", "-")
}

func (s *soak) remove(p pod) error {
	s.mu.Lock()
	delete(s.pods, p.namespace+"/"+p.name)
	s.mu.Unlock()
	return change("", "--namespace", p.namespace, "delete", "pod", p.name, "--ignore-not-found", "--wait=false")
}

// flood replaces all large Pods.
func (s *soak) flood(large []pod) error {
	s.mu.Lock()
	old := slices.Collect(maps.Values(s.pods))
	s.mu.Unlock()
	for _, p := range old {
		if p.shape != "large" {
			continue
		}
		if err := s.remove(p); err != nil {
			return err
		}
	}
	return s.create(large...)
}

func (s *soak) setAddress(connector, address string, anew bool) error {
	s.mu.Lock()
	s.addresses[connector] = address
	s.mu.Unlock()
	if anew {
		if err := change("", "--namespace", podNamespaces[0], "delete", "connector", connector,
			"--ignore-not-found"); err != nil {
			return err
		}
	}
	return change(connectorManifest(connector, classOfConnector[connector], address), "apply", "-f", "-")
}

func (s *soak) setClass(class string, revision int) error {
	s.mu.Lock()
	s.revisions[class] = revision
	ballast := s.ballast && class == "large"
	s.mu.Unlock()
	return change(classManifest(class, revision, ballast), "apply", "-f", "-")
}

func (s *soak) withdraw(namespace string) error {
	return change("", "--namespace", podNamespaces[0], "delete", "rolebinding", namespace, "--ignore-not-found")
}

func (s *soak) grant(namespace string) error {
	return change(fmt.Sprintf(`
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %s, namespace: %s}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: connectors-connector-viewer-role}
subjects: [{kind: ServiceAccount, name: default, namespace: %s}]
`, namespace, podNamespaces[0], namespace), "apply", "-f", "-")
}

// fault kills a process, or stops it for some time, and measures how long it takes from its end until it serves.
func (s *soak) fault(target string, kill bool, lasts time.Duration) error {
	ready := s.watch.driverReady
	switch target {
	case "kubelet":
		ready = kubeletReady
		if kill {
			s.watch.kubeletIsKilled()
		}
		s.node.Kubelet = s.interrupt(s.node.Kubelet, kill, lasts)
	case "API server":
		ready = apiServerReady
		s.node.APIServer = s.interrupt(s.node.APIServer, kill, lasts)
	default:
		// A driver that has not come back from the last fault is left alone, or it never would on a busy machine.
		pid := s.watch.driverProcess(target)
		if pid == 0 || ready() != nil {
			s.mu.Lock()
			s.counts["no "+target+" to be found, or not back yet"]++
			s.mu.Unlock()
			return nil
		}
		signal := unix.SIGSTOP
		if kill {
			signal = unix.SIGKILL
			if target != "renderer" {
				s.watch.expectRestart()
			}
		}
		process, err := os.FindProcess(pid) // by a pidfd, so that no other process gets the second signal
		if err == nil {
			err = process.Signal(signal)
		}
		if err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		if !kill {
			time.Sleep(lasts) // what the fault is
			process.Signal(unix.SIGCONT)
		}
	}
	began := time.Now()
	err := cluster.Await(backLimit, ready)
	s.took("until it serves again: "+target, time.Since(began))
	return err
}

// interrupt kills or stops a component, and has it go on after some time.
func (s *soak) interrupt(c *node.Component, kill bool, lasts time.Duration) *node.Component {
	if kill {
		c.Stop()
		time.Sleep(lasts) // what the fault is
		return s.node.Restart(c)
	}
	c.Cmd.Process.Signal(syscall.SIGSTOP)
	time.Sleep(lasts)
	c.Cmd.Process.Signal(syscall.SIGCONT)
	return c
}

func kubeletReady() error {
	_, err := cluster.Kubectl("get", "--raw", "/api/v1/nodes/"+node.Name+"/proxy/healthz", "--request-timeout=5s")
	return err
}

func apiServerReady() error {
	_, err := cluster.Kubectl("get", "--raw", "/readyz", "--request-timeout=5s")
	return err
}

func (s *soak) took(what string, time time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.worst[what] = max(s.worst[what], time)
}

// back waits until all components serve, and the driver of deploy.yaml is the one that runs.
func (s *soak) back() error {
	for _, ready := range []func() error{apiServerReady, kubeletReady, func() error {
		_, err := cluster.Kubectl("--namespace=connectors-system", "rollout", "status", "daemonset/connectors-csi",
			"--timeout=5m")
		return err
	}} {
		if err := cluster.Await(backLimit, ready); err != nil {
			return err
		}
	}
	return nil
}

// settled waits until every Pod runs, and what was read last in it is the newest.
func (s *soak) settled() {
	began := time.Now()
	for name, p := range s.pods {
		want := fmt.Sprintf("revision-%d", s.revisions[p.class])
		for _, connector := range p.connectors {
			want += " " + s.addresses[connector]
		}
		err := cluster.Await(time.Until(began.Add(settleLimit)), func() error {
			if got := s.watch.latest(name); got != want {
				return fmt.Errorf("in Pod %s is %q, instead of %q", name, got, want)
			}
			return nil
		})
		if err != nil {
			s.watch.wrong("after all was back: %v", err)
		}
	}
	s.took("until all files were the newest, after all was back", time.Since(began))
}

// empty deletes all Pods and waits until nothing is left of them, in the node and in the driver.
func (s *soak) empty() {
	began := time.Now()
	for _, namespace := range podNamespaces {
		if err := change("", "--namespace", namespace, "delete", "pods", "--all", "--wait=false"); err != nil {
			s.watch.wrong("%v", err)
		}
	}
	if err := cluster.Await(goneLimit, s.watch.nothingLeft); err != nil {
		s.watch.wrong("after all Pods were deleted: %v", err)
	}
	s.took("until nothing was left of the Pods", time.Since(began))
	if err := s.compareDrivers(); err != nil {
		s.watch.wrong("%v", err)
	}
	for _, namespace := range podNamespaces {
		cluster.Kubectl("delete", "namespace", namespace, "--timeout=1m")
	}
}

// compareDrivers compares what the driver holds after all with what a fresh one does that has had one Pod. Go keeps
// threads, and connections end a while after their use: what is lost with every event is more than the tolerance.
func (s *soak) compareDrivers() error {
	used, err := s.watch.measureDriver()
	if err != nil {
		return err
	}
	// A new Pod, since kubelet would wait before it started this one's container once more.
	s.watch.readLogs()
	if _, err := cluster.Kubectl("--namespace=connectors-system", "delete", "pods", driverPods,
		"--timeout=1m"); err != nil {
		return err
	}
	p := pod{podNamespaces[0], "fresh", "plain", "b", []string{"b-1"}}
	if err := errors.Join(s.back(), s.create(p)); err != nil {
		return err
	}
	if err := cluster.Await(settleLimit, func() error {
		if s.watch.latest(p.namespace+"/"+p.name) == "" {
			return errors.New("a Pod does not run with a fresh driver")
		}
		return nil
	}); err != nil {
		return err
	}
	if err := errors.Join(s.remove(p), cluster.Await(goneLimit, s.watch.nothingLeft)); err != nil {
		return err
	}
	fresh, err := s.watch.measureDriver()
	if err != nil {
		return err
	}
	fmt.Printf("the driver after the soak has %v, a fresh one %v\n", used, fresh)
	if used.descriptors > fresh.descriptors+5 || used.goroutines > fresh.goroutines+10 || used.threads > fresh.threads+15 {
		return fmt.Errorf("the driver has %v after the soak, and a fresh one %v", used, fresh)
	}
	return nil
}

// summary prints what happened, and returns what was wrong.
func (s *soak) summary(seed uint64) error {
	fmt.Printf("\nSummary of seed %d\n", seed)
	for _, what := range slices.Sorted(maps.Keys(s.counts)) {
		fmt.Printf("  %-52s %6d\n", what, s.counts[what])
	}
	for _, what := range slices.Sorted(maps.Keys(s.worst)) {
		fmt.Printf("  %-52s %6.1f s at worst\n", what, s.worst[what].Seconds())
	}
	return s.watch.summary()
}

// ParseOptions returns the command's options, and ends the process if they are wrong.
func ParseOptions(args []string) (duration time.Duration, seed uint64) {
	flags := flag.NewFlagSet("soak", flag.ExitOnError)
	flags.DurationVar(&duration, "duration", 10*time.Minute, "how long things change")
	flags.Uint64Var(&seed, "seed", 0, "repeats the events of an earlier run (default: a random one, which is printed)")
	flags.Parse(args)
	return duration, seed
}
