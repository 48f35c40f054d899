package tests

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
)

// What people who may write Pods and Connectors in their own namespaces can do to the driver, which serves everybody:
// little. The figures are printed; the bounds are those of docs/security.md.

// hostileClass is an honest one: what is hostile are the parameters that Pods set.
var hostileClass = configurations{
	"until":   {"until": "{{ range until (int .configurations.count) }}x{{ end }}"}, // hits the limit of memory
	"endless": {"endless": "{{ range 9223372036854775807 }}{{ end }}{{ .configurations.count }}"},
	"repeat":  {"repeat": `{{ repeat (int .configurations.count) "x" }}`},
	"address": {"address": "{{ .connector.spec.address }}"},
	"many":    manyFiles(255),
}

func manyFiles(count int) map[string]string {
	files := map[string]string{}
	for i := range count {
		files[fmt.Sprintf("file-%d", i)] = ""
	}
	return files
}

// withCount are the attributes of a volume with a configuration of hostileClass and its parameter.
func withCount(configuration string, count int) string {
	return fmt.Sprintf(`{connector.name: target, configuration.names: %s, configuration.params: '{"%s": {"count": %d}}'}`,
		configuration, configuration, count)
}

func TestOnePodsTemplateOrConnectorDoesNotStopTheDriver(t *testing.T) {
	ns := measured(t)
	freshDriver(t)
	ns.class("one", hostileClass)
	ns.connector("target", "one", "https://one.example.com")
	ns.allow("default", ns)
	ns.pod("until", withCount("until", 1000000000))
	ns.refused("until", "code = FailedPrecondition", `ConnectorClass "one", configuration "until", file "until": rendering it takes more than`)

	// 1.4 MB, of which decoded copies are many times as large.
	lists := strings.TrimSuffix(strings.Repeat("[],", 466_000), ",")
	ns.create(fmt.Sprintf(`{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "Connector", "metadata": {"name": "large"},
		"spec": {"connectorClassName": "one", "address": "https://large.example.com", "lists": [%s]}}`, lists))
	created := ns.deploy("large", 16, `{connector.name: large, configuration.names: address}`)
	wantNoRestart(t)
	peak, most := driverMemory(t)
	t.Logf("sixteen Pods with a Connector of %d KiB ran after %v; the driver had at most %d MiB of memory, its limit is %d MiB",
		len(lists)>>10, created.Round(time.Second), peak>>20, most>>20)
}

// Some of the hostile Pods hit the limit of memory and most that of processor time, each with a template of its own, so
// that nothing is known of it: before all of a namespace's are tried, its account of processor time is empty.
func TestHundredHostilePodsLeaveTheDriverToOthers(t *testing.T) {
	honest := measured(t)
	freshDriver(t)
	honest.target("honest", map[string]string{"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}"})
	// round starts 30 honest Pods, says what their calls took, and leaves their end to the background.
	round := func(name string) time.Duration {
		t.Helper()
		before := len(publishes(t))
		created := honest.deploy(name, 30, mountTarget)
		calls := slices.DeleteFunc(publishes(t)[before:], func(p publish) bool { return p.namespace != honest.name })
		failed := slices.IndexFunc(calls, func(p publish) bool { return p.code != "" })
		p99 := percentile99(calls)
		t.Logf("%s: 30 honest Pods ran after %v; the 99th percentile of their %d NodePublishVolume is %v",
			name, created.Round(100*time.Millisecond), len(calls), p99)
		if len(calls) < 30 || failed >= 0 {
			t.Errorf("%s: there are %d calls for 30 volumes, and one failed: %v", name, len(calls), failed >= 0)
		}
		honest.kubectl("delete", "deployment", name, "--wait=false")
		return p99
	}
	round("alone")

	hostile := []namespace{newNamespace(t), newNamespace(t)}
	honest.class("hundred", hostileClass)
	for i, ns := range hostile {
		ns.connector("target", "hundred", "https://one.example.com")
		ns.allow("default", ns)
		var pods []string
		for j := range 50 {
			template := "endless"
			if j%5 == 0 {
				template = "until"
			}
			pods = append(pods, cluster.PodManifest(fmt.Sprintf("hostile-%d", j), withCount(template, 1000000000+100*i+j)))
		}
		ns.apply(strings.Join(pods, "---"))
	}
	const most = 6 * time.Second // one rendering of another namespace, which takes five at most, and their own
	if p99 := round("beside"); p99 > most {
		t.Errorf("while hostile Pods start, the 99th percentile of NodePublishVolume of honest ones is %v", p99)
	}

	// What follows is steady: each Pod has been refused, each namespace has used up its processor time, and what each Pod
	// hits is remembered and tried again at growing intervals.
	emptied := func(ns namespace) bool {
		return slices.ContainsFunc(publishes(t), func(p publish) bool {
			return p.namespace == ns.name && p.code == "ResourceExhausted" &&
				strings.Contains(p.err, "has used up its 10s of processor time")
		})
	}
	honest.eventually(func() error {
		for _, ns := range hostile {
			if refused := ns.pending(); refused != 50 {
				return fmt.Errorf("of the 50 Pods of namespace %s %d are known to be refused", ns.name, refused)
			}
			if !emptied(ns) {
				return fmt.Errorf("namespace %s has not used up its processor time", ns.name)
			}
		}
		return nil
	})
	if p99 := round("after"); p99 > most {
		t.Errorf("while hostile Pods are tried again, the 99th percentile of NodePublishVolume of honest ones is %v", p99)
	}
	began, used := time.Now(), driverProcessorTime(t)
	before := len(publishes(t))
	time.Sleep(40 * time.Second) // over which is measured: what comes back pays for a try of each namespace
	used = driverProcessorTime(t) - used
	share := used.Seconds() / time.Since(began).Seconds()
	peak, memory := driverMemory(t)
	t.Logf("steady: with %d hostile calls in %.0f s the driver and its renderers use %.1f %% of a core; they had at most %d MiB of memory, the limit is %d MiB",
		len(publishes(t))-before, time.Since(began).Seconds(), 100*share, peak>>20, memory>>20)
	if share > 0.25 {
		t.Errorf("hostile Pods keep the driver busy for %.2f of a core", share)
	}
	wantNoRestart(t)
	for _, p := range publishes(t) {
		switch says := func(part string) bool { return strings.Contains(p.err, part) }; {
		case p.namespace == honest.name:
		case p.code == "FailedPrecondition" && says("rendering it takes more than"):
		case p.code == "ResourceExhausted" && says("processor time"):
		case p.code == "DeadlineExceeded" && says("rendering took too long"): // in the line behind the others
		case p.code == "Unavailable" && says("the node is too busy: "): // for two seconds of processor time in five
		case says("no answer from the API server"): // which starts 130 Pods on the same two cores
		default:
			t.Errorf("a hostile Pod was refused with %s: %s", p.code, p.err)
		}
	}
	for _, ns := range append(hostile, honest) {
		uids := ns.uids()
		ns.kubectl("delete", "pods", "--all", "--timeout=3m")
		for _, uid := range uids {
			ns.gone(uid)
		}
	}
}

// pending returns how many of the namespace's Pods have an event that a volume could not be mounted, and do not run.
func (ns namespace) pending() int {
	ns.Helper()
	refused := map[string]bool{}
	for pod := range strings.FieldsSeq(ns.kubectl("get", "events", "--field-selector=reason=FailedMount",
		"--output=jsonpath={.items[*].involvedObject.name}")) {
		refused[pod] = true
	}
	for pod := range strings.FieldsSeq(ns.kubectl("get", "pods", "--field-selector=status.phase!=Pending",
		"--output=jsonpath={.items[*].metadata.name}")) {
		delete(refused, pod)
	}
	return len(refused)
}

// A tenant who has no right on classes does all at once that Pods, ServiceAccounts and Connectors are good for: he
// fills the memory for files and objects, uses up processor time, asks for what does not exist, and scrapes the
// metrics.
func TestATenantWhoTakesAllThatHeCanIsAlone(t *testing.T) {
	honest := measured(t)
	freshDriver(t)
	honest.target("neighbour", map[string]string{"address": "{{ .connector.spec.address }}",
		"token": "{{ .context.token }}"})
	alone := honest.fastest("alone", 1)
	// A node's kubelet has work with Pods that wait for what does not come, whoever is asked for it: here for ConfigMaps.
	harmless := newNamespace(t)
	harmless.waiting(80)
	control := honest.fastest("control", 2)
	harmless.kubectl("delete", "pods", "--all", "--timeout=3m")

	tenant := newNamespace(t)
	tenant.class("tenant", hostileClass)
	tenant.connector("target", "tenant", "https://one.example.com")
	tenant.allow("default", tenant)
	stop := scrape(driverURL(t)+"/metrics", 64)
	defer stop()
	// Kubelet's own limit is 110 Pods: 20 are the neighbour's, one is the driver's.
	const full = 65
	tenant.fill(0, full)
	honest.eventually(func() error {
		mounted := 0
		for _, uid := range tenant.uids() {
			mounted += len(cluster.Mounts(uid))
		}
		if mounted < 2*full {
			return fmt.Errorf("of %d volumes %d are mounted", 2*full, mounted)
		}
		return nil
	})
	tenant.objects(8)
	var pods []string
	for i := range 8 {
		pods = append(pods, cluster.PodManifest(fmt.Sprintf("until-%d", i), withCount("until", 1000000000+i)),
			podOfVolumes(fmt.Sprintf("many-%d", i), 17, `{connector.name: target, configuration.names: many}`))
	}
	tenant.apply(strings.Join(pods, "---"))

	before, used, began := len(publishes(t)), driverProcessorTime(t), time.Now()
	// The Pods that ran in time stay. The rest of the machine is busy at times, too.
	beside, most := honest.deploy("beside", 20, mountTarget).Round(100*time.Millisecond), control*3/2
	for try := 0; beside > most && try < 8; try++ {
		honest.deleteDeployment("beside")
		beside = min(beside, honest.deploy("beside", 20, mountTarget).Round(100*time.Millisecond))
	}
	calls := slices.DeleteFunc(publishes(t)[before:], func(p publish) bool { return p.namespace != honest.name })
	t.Logf("20 Pods of a neighbour run after %v alone, after %v beside as many Pods as the tenant's that wait for ConfigMaps, and after "+
		"%v beside the tenant, when the 99th percentile of their NodePublishVolume is %v and the driver uses %.2f of a core",
		alone, control, beside, percentile99(calls), (driverProcessorTime(t)-used).Seconds()/time.Since(began).Seconds())
	if beside > most {
		t.Errorf("beside the tenant a neighbour's Pods take %.1f times as long as beside harmless Pods",
			beside.Seconds()/control.Seconds())
	}
	honest.quickRepublishes()

	// With more Pods than kubelet allows by default he fills the node's budget too. That stops new volumes, not those
	// there are.
	tenant.fill(full, full+60)
	honest.eventually(func() error {
		used, budget := metric(t, "connectors_csi_volumes_bytes"), metric(t, "connectors_csi_volumes_budget_bytes")
		if used < 0.95*budget || used > budget {
			return fmt.Errorf("the volumes use %.0f of %.0f bytes", used, budget)
		}
		return nil
	})
	honest.eventually(func() error {
		if !slices.ContainsFunc(publishes(t), func(p publish) bool {
			return p.code == "ResourceExhausted" && strings.Contains(p.err, "--volumes-budget")
		}) {
			return errors.New("no volume was refused for the node's budget")
		}
		return nil
	})
	honest.kubectl("patch", "connector", "target", "--type=merge", "--patch",
		`{"spec": {"address": "https://two.example.com"}}`)
	for _, uid := range honest.uids() {
		honest.eventually(func() error {
			if address := readFile(t, cluster.VolumeDir(uid, "volume")+"/address"); address != "https://two.example.com" {
				return fmt.Errorf("Pod %s has the address %q", uid, address)
			}
			return nil
		})
	}
	wantNoRestart(t)
	peak, limit := driverMemory(t)
	t.Logf("with every budget full the driver had at most %d MiB of memory, its limit is %d MiB", peak>>20, limit>>20)

	tenant.kubectl("delete", "pods", "--all", "--timeout=5m")
	honest.eventually(func() error {
		if used := metric(t, "connectors_csi_volumes_bytes"); used > 20*1024*1024 {
			return fmt.Errorf("the tenant's Pods are deleted, and the volumes use %.0f bytes", used)
		}
		return nil
	})
}

// fill creates Pods whose volumes are as large as a Pod's may be. A volume that cannot be mounted keeps their
// containers from being started, which would cost the node more than the driver.
func (ns namespace) fill(from, to int) {
	ns.Helper()
	var pods []string
	for i := from; i < to; i++ {
		pod := podOfVolumes(fmt.Sprintf("full-%d", i), 3, "ATTRIBUTES")
		for _, attributes := range []string{
			withCount("repeat", 1000000-i), withCount("repeat", 1003000-i),
			`{connector.name: nobody, configuration.names: address}`,
		} {
			pod = strings.Replace(pod, "ATTRIBUTES", attributes, 1)
		}
		pods = append(pods, pod)
	}
	ns.apply(strings.Join(pods, "---"))
}

// objects creates 32 Connectors of 100 KiB, and as many Pods as given, each with a ServiceAccount of its own, that
// mount all of them.
func (ns namespace) objects(pods int) {
	ns.Helper()
	var names []string
	for i := range 32 {
		name := fmt.Sprintf("large-%d", i)
		names = append(names, name)
		ns.create(fmt.Sprintf(`{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "Connector", "metadata": {"name": %q},
			"spec": {"connectorClassName": "tenant", "address": "https://large.example.com", "text": "%s"}}`, name, strings.Repeat("x", 100<<10)))
	}
	for i := range pods {
		account := fmt.Sprintf("objects-%d", i)
		ns.kubectl("create", "serviceaccount", account)
		ns.allow(account, ns)
		ns.pod(account, `{configuration.names: address, connectors: "`+strings.Join(names, ",")+`"}`,
			"serviceAccountName: "+account)
	}
}

// create creates an object that is too large for kubectl apply.
func (ns namespace) create(manifest string) {
	ns.Helper()
	if _, err := cluster.KubectlStdin(manifest, "--namespace", ns.name, "create", "-f", "-"); err != nil {
		ns.Fatal(err)
	}
}

// quickRepublishes says of the calls of a while that changed nothing, which are in the metrics and not in the log, how
// many took more than 50 ms: not most of them.
func (ns namespace) quickRepublishes() {
	ns.Helper()
	const name = "connectors_csi_publish_duration_seconds"
	count := func() (all, quick, logged, loggedQuick int) {
		for _, p := range publishes(ns.T) {
			logged++
			if p.took <= 50*time.Millisecond {
				loggedQuick++
			}
		}
		return int(metric(ns.T, name+"_count")), int(metric(ns.T, name+`_bucket{le="0.05"}`)), logged, loggedQuick
	}
	all, quick, logged, loggedQuick := count()
	var republishes, slow int
	ns.eventually(func() error {
		all2, quick2, logged2, loggedQuick2 := count()
		republishes = (all2 - all) - (logged2 - logged)
		slow = republishes - ((quick2 - quick) - (loggedQuick2 - loggedQuick))
		if republishes < 200 { // which is enough to know what most of them take
			return fmt.Errorf("there were %d republishes", republishes)
		}
		return nil
	})
	ns.Logf("of %d republishes beside the tenant, %d took more than 50 ms", republishes, slow)
	// Once a minute they wait for the API server, which has no more of the machine's two processors than the tenant leaves
	// it.
	if slow > republishes/2 {
		ns.Errorf("of %d republishes, %d took more than 50 ms", republishes, slow)
	}
}

// waiting creates Pods with three volumes each that cannot be mounted, since there are no such ConfigMaps.
func (ns namespace) waiting(pods int) {
	ns.Helper()
	var manifests []string
	for i := range pods {
		manifests = append(manifests, fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: waiting-%d}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: %s, command: [sleep, infinity]}
  volumes:
  - {name: a, configMap: {name: nobody-a}}
  - {name: b, configMap: {name: nobody-b}}
  - {name: c, configMap: {name: nobody-c}}
`, i, image.Client))
	}
	ns.apply(strings.Join(manifests, "---"))
}

// fastest starts 20 Pods so many times and returns the shortest time.
func (ns namespace) fastest(name string, times int) time.Duration {
	ns.Helper()
	var took []time.Duration
	for range times {
		took = append(took, ns.deploy(name, 20, mountTarget).Round(100*time.Millisecond))
		ns.deleteDeployment(name)
	}
	return slices.Min(took)
}

// scrape gets a page every second, many times at once, until stop is called.
func scrape(url string, times int) (stop func()) {
	ended := make(chan struct{})
	var scrapers sync.WaitGroup
	for range times {
		scrapers.Go(func() {
			for {
				select {
				case <-ended:
					return
				case <-time.After(time.Second):
					cluster.HTTPGet(url)
				}
			}
		})
	}
	return func() { close(ended); scrapers.Wait() }
}

// A Deployment whose class hits the limit of processor time is tried again by kubelet for ever, and its namespace goes
// on beside it: new Pods run, a change reaches running ones, and tokens are renewed. It takes ten minutes, or one where
// the environment has no CONNECTORS_CSI_LONG_TESTS: in that each bad Pod is refused, tried again after half a minute,
// and refused again, and no token is renewed.
func TestOneBadDeploymentAndItsOwnNamespace(t *testing.T) {
	ns := measured(t)
	freshDriver(t)
	long := os.Getenv("CONNECTORS_CSI_LONG_TESTS") != ""
	duration := time.Minute
	if long {
		duration = 10 * time.Minute
	}
	ns.target("good", map[string]string{"address": "{{ .connector.spec.address }}", "token": "{{ .context.token }}"})
	ns.class("bad", configurations{"config": {"endless": "{{ range 9223372036854775807 }}{{ end }}"}})
	ns.connector("bad", "bad", "https://bad.example.com")
	ns.pod("running", `{connector.name: target, configuration.names: config, token.expiration: 10m}`)
	ns.running("running")
	dir := cluster.VolumeDir(ns.uid("running"), "volume")
	token, issued := readFile(t, dir+"/token"), time.Now()

	began, used := time.Now(), driverProcessorTime(t)
	var bad []string
	for i := range 10 {
		bad = append(bad, cluster.PodManifest(fmt.Sprintf("bad-%d", i), `{connector.name: bad, configuration.names: config}`))
	}
	ns.apply(strings.Join(bad, "---"))
	var slowest, latest time.Duration
	for i := 0; time.Since(began) < duration; i++ {
		if i < 10 {
			name := fmt.Sprintf("honest-%d", i)
			created := time.Now()
			ns.pod(name, mountTarget)
			ns.running(name)
			slowest = max(slowest, time.Since(created))
		}
		address := fmt.Sprintf("https://%d.example.com", i)
		ns.kubectl("patch", "connector", "target", "--type=merge", "--patch",
			fmt.Sprintf(`{"spec": {"address": %q}}`, address))
		changed := time.Now()
		awaitFile(t, dir+"/address", address)
		latest = max(latest, time.Since(changed))
		time.Sleep(duration / 12) // the time over which is measured has so many changes
	}
	share := (driverProcessorTime(t) - used).Seconds() / time.Since(began).Seconds()
	calls := slices.DeleteFunc(publishes(t), func(p publish) bool { return p.code == "" })
	t.Logf("in %v: %d calls for bad Pods were refused; the slowest of 10 honest Pods ran after %v, a change reached one after %v at most; "+
		"the driver and its renderers used %.1f %% of a core", time.Since(began).Round(time.Second), len(calls),
		slowest.Round(100*time.Millisecond),
		latest.Round(time.Millisecond), 100*share)
	if slowest > 5*time.Second || latest > 2*time.Second || share > 0.03 && long {
		t.Errorf("an honest Pod ran after %v, a change came after %v, the driver used %.1f %% of a core", slowest, latest,
			100*share)
	}
	for _, p := range calls {
		if p.namespace == ns.name && !strings.Contains(p.err, "rendering it takes more than") {
			t.Errorf("refused with %s: %s", p.code, p.err)
		}
	}
	if pending := ns.pending(); pending != 10 {
		t.Errorf("%d Pods are known to be refused", pending)
	}
	if long {
		ns.eventually(func() error { // after 80 % of its ten minutes
			if readFile(t, dir+"/token") == token {
				return fmt.Errorf("the token is not renewed %v after it was issued", time.Since(issued))
			}
			return nil
		})
	}
	wantNoRestart(t)
}
