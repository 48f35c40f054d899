// Package scale measures many drivers at one API server: the command scale.
package scale

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
)

// The API server is the node's; each driver has a node
// of its own, which consists of namespaces and of something that does what kubelet does (node.go).
//
// On every node the volumes belong to Pods of five ServiceAccounts, and each mounts two Connectors: one that all
// have in common, and one that is its ServiceAccount's. So a node has ten pairs of ServiceAccount and Connector. Their
// classes are three, and all volumes use that of the common Connector.
const (
	podNamespace    = "scale"
	serviceAccounts = 5
	commonClass     = "scale-common"

	classFile     = "class.conf"     // its first line changes with the class of the common Connector
	connectorFile = "connector.conf" // its first line changes with the other Connector

	changes = 5 // of a Connector, and of a class

	// A driver opens a stream again after 25 to 30 minutes.
	streamsPerHour = 60 / 27.5
)

const scaleManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: scale}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: viewers, namespace: scale}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: connectors-connector-viewer-role}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: "system:serviceaccounts:scale"}]
---
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata: {name: scale-common}
spec: {configurations: [{name: common, data: {class.conf: "first\nproxy = {{ .connector.spec.address }}"}}]}
---
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata: {name: common, namespace: scale}
spec: {connectorClassName: scale-common, address: "https://common.example.com"}
`

const scaleClass = `---
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata: {name: scale-%d}
spec:
  configurations:
  - name: own
    data:
      connector.conf: |
        {{ .connector.spec.address }}
        [http "{{ .connector.spec.address }}"]
            extraHeader = Authorization: Basic {{ printf ":%%s" .context.token | b64enc }}
`

const scaleAccount = `---
apiVersion: v1
kind: ServiceAccount
metadata: {name: account-%[1]d, namespace: scale}
---
apiVersion: connectors.alauda.io/v1alpha1
kind: Connector
metadata: {name: own-%[1]d, namespace: scale}
spec: {connectorClassName: scale-%[2]d, address: "https://own.example.com/first"}
`

var (
	connectorResource = schema.GroupVersionResource{Group: "connectors.alauda.io", Version: "v1alpha1", Resource: "connectors"}
	classResource     = schema.GroupVersionResource{Group: "connectors.alauda.io", Version: "v1alpha1", Resource: "connectorclasses"}
)

// Options are the flags of the command.
type Options struct {
	drivers  []int
	volumes  int
	duration time.Duration
	json     string
	chart    string
}

// ParseOptions reads the flags, and ends the process if they are wrong.
func ParseOptions(arguments []string) Options {
	o := Options{drivers: []int{1, 10, 50}}
	flags := flag.NewFlagSet("scale", flag.ExitOnError)
	flags.Func("drivers", "how many drivers, one run for each number (default 1,10,50)", func(value string) error {
		o.drivers = nil
		for text := range strings.SplitSeq(value, ",") {
			number, err := strconv.Atoi(text)
			if err != nil || number < 1 {
				return fmt.Errorf("%q is not a number of drivers", text)
			}
			o.drivers = append(o.drivers, number)
		}
		return nil
	})
	flags.IntVar(&o.volumes, "volumes", 30, "volumes of each driver")
	flags.DurationVar(&o.duration, "duration", 2*time.Minute, "how long to watch while nothing changes")
	flags.StringVar(&o.json, "json", "", "write the figures into this file as well (relative to e2e)")
	flags.StringVar(&o.chart, "chart", "", "draw the figures into this SVG file (relative to e2e)")
	flags.Parse(arguments)
	if flags.NArg() > 0 || o.volumes < serviceAccounts {
		fmt.Fprintf(os.Stderr, "e2e: scale takes flags only, and --volumes of at least %d\n", serviceAccounts)
		os.Exit(2)
	}
	return o
}

// scaleRun is the command at work.
type scaleRun struct {
	Options
	node     *node.Node
	began    time.Time
	client   *kubernetes.Clientset
	objects  dynamic.Interface
	ca       []byte
	watcher  *fsnotify.Watcher
	watched  sync.Map      // volumes by directory
	idleCPU  time.Duration // of the API server, in an hour without drivers
	revision int           // of what changes

	nodes   []*scaleNode
	volumes []*volume
	streams int                // that the drivers are to have open
	stop    context.CancelFunc // ends kubelet's calls
}

// Run measures for each number of drivers, and reports.
func Run(n *node.Node, o Options) error {
	s, err := newScaleRun(n, o)
	if err != nil {
		return err
	}
	var report report
	for i, drivers := range o.drivers {
		figures, err := s.measure(drivers)
		if err != nil {
			return fmt.Errorf("%d drivers: %w", drivers, err)
		}
		report.Runs = append(report.Runs, figures)
		if i == len(o.drivers)-1 { // more than once would tell nothing else: kubelet's interval is what counts
			if report.Polling, err = s.polling(); err != nil {
				return fmt.Errorf("polling: %w", err)
			}
		}
		if err := s.clear(); err != nil {
			return err
		}
	}
	return report.write(o)
}

// newScaleRun prepares what all numbers of drivers have in common.
func newScaleRun(n *node.Node, o Options) (*scaleRun, error) {
	s := &scaleRun{Options: o, node: n, began: time.Now()}
	config, err := clientcmd.BuildConfigFromFlags("", n.Path("admin.kubeconfig"))
	if err != nil {
		return nil, err
	}
	config.QPS = -1 // no limit
	if s.client, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	if s.objects, err = dynamic.NewForConfig(config); err != nil {
		return nil, err
	}
	if s.ca, err = os.ReadFile(n.Path("apiserver.crt")); err != nil {
		return nil, err
	}
	if s.watcher, err = fsnotify.NewBufferedWatcher(1 << 16); err != nil {
		return nil, err
	}
	go s.look()
	if err := os.Mkdir(nodesDir, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", nodesDir, "tmpfs", 0, "mode=0755"); err != nil {
		return nil, err
	}
	manifest := scaleManifest + fmt.Sprintf(scaleClass, 0) + fmt.Sprintf(scaleClass, 1)
	for i := range serviceAccounts {
		manifest += fmt.Sprintf(scaleAccount, i, i%2)
	}
	// Everything of the driver but the DaemonSet, whose place the processes take that run here.
	if _, err := cluster.Kubectl("apply", "-f", "../deploy.yaml"); err != nil {
		return nil, err
	}
	if _, err := cluster.Kubectl("delete", "--namespace=connectors-system", "daemonset/connectors-csi"); err != nil {
		return nil, err
	}
	if _, err := cluster.KubectlStdin(manifest, "apply", "-f", "-"); err != nil {
		return nil, err
	}
	s.say("the API server alone, for %v", o.duration)
	before, err := processorTime(n.APIServer)
	if err != nil {
		return nil, err
	}
	time.Sleep(o.duration) // over which is measured
	after, err := processorTime(n.APIServer)
	s.idleCPU = perHour(after-before, o.duration)
	return s, err
}

// say prints what happens now.
func (s *scaleRun) say(format string, a ...any) {
	fmt.Printf("%5.0f s  %d drivers: %s\n", time.Since(s.began).Seconds(), len(s.nodes), fmt.Sprintf(format, a...))
}

// look tells volumes that their files have changed, as inotify has it: ..data becomes another link.
func (s *scaleRun) look() {
	for {
		select {
		case event := <-s.watcher.Events:
			if filepath.Base(event.Name) == "..data" && event.Has(fsnotify.Create) {
				if v, ok := s.watched.Load(filepath.Dir(event.Name)); ok {
					v.(*volume).look()
				}
			}
		case err := <-s.watcher.Errors:
			fmt.Fprintln(os.Stderr, "e2e: watching the files:", err)
			os.Exit(1) // no latency would be true
		}
	}
}

// measure makes so many nodes, and measures on them one thing after the other.
func (s *scaleRun) measure(drivers int) (f figures, err error) {
	if err := s.prepare(drivers); err != nil {
		return f, err
	}
	f.Drivers, f.Volumes, f.Streams = drivers, len(s.volumes), s.streams
	memory, err := s.serverMemory()
	if err != nil {
		return f, err
	}
	for _, step := range []func(*figures) error{s.publishAll, s.restWithStreams, s.changeConnector,
		s.changeClass, s.restartServer, s.restartDrivers} {
		if err := step(&f); err != nil {
			return f, err
		}
	}
	f.Rest.ServerKiBPerStream = (f.Rest.serverMemory - memory) / 1024 / float64(f.Streams)
	err = s.countGoroutines(&f)
	s.say("the API server: %.0f KiB and %.4f %% of a core for each of %d streams; a driver: %.2f %%, %v", f.Rest.ServerKiBPerStream,
		f.Rest.ServerCPUPercentPerStream, f.Streams, f.Rest.DriverCPUPercent, f.Driver)
	return f, err
}

// prepare makes the nodes, with Pods and their tokens, and starts the drivers.
func (s *scaleRun) prepare(drivers int) error {
	s.say("preparing %d drivers with %d volumes each", drivers, s.Options.volumes)
	var tasks errgroup.Group
	tasks.SetLimit(16)
	for i := range drivers {
		name := fmt.Sprintf("connectors-csi-%d", i) // as the Pods of the DaemonSet are called
		pod, err := s.createPod("connectors-system", name, "connectors-csi")
		if err != nil {
			return err
		}
		token, err := cluster.RequestBoundToken(context.Background(), s.client, pod, 24*time.Hour) // which kubelet would renew
		if err != nil {
			return err
		}
		node, err := newScaleNode(name, 20000+i, token.Token, s.ca)
		if err != nil {
			return err
		}
		s.nodes = append(s.nodes, node)
		for j := range s.Options.volumes {
			account := j % serviceAccounts
			v := &volume{node: node, client: s.client, account: account, files: map[string]firstLine{}}
			node.volumes = append(node.volumes, v)
			s.volumes = append(s.volumes, v)
			tasks.Go(func() (err error) {
				v.pod, err = s.createPod(podNamespace, fmt.Sprintf("pod-%d-%d", i, j), fmt.Sprintf("account-%d", account))
				if err != nil {
					return err
				}
				v.dir = fmt.Sprintf(targetFormat, node.dir, v.pod.UID)
				_, err = v.podToken(context.Background())
				return err
			})
		}
	}
	if err := tasks.Wait(); err != nil {
		return err
	}
	s.streams = drivers * (2*serviceAccounts + 3)
	for _, node := range s.nodes {
		tasks.Go(func() error { return node.start(s.node) })
	}
	return tasks.Wait()
}

// createPod makes a Pod that nobody will ever run.
func (s *scaleRun) createPod(namespace, name, serviceAccount string) (*core.Pod, error) {
	return s.client.CoreV1().Pods(namespace).Create(context.Background(), &core.Pod{
		ObjectMeta: meta.ObjectMeta{Name: name},
		Spec: core.PodSpec{
			ServiceAccountName: serviceAccount,
			SchedulerName:      "none",
			Containers:         []core.Container{{Name: "container", Image: image.Pause}},
		},
	}, meta.CreateOptions{})
}

// publishAll lets kubelet begin with all volumes at once.
func (s *scaleRun) publishAll(f *figures) error {
	s.say("publish of all volumes at once")
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	began := time.Now()
	for _, v := range s.volumes {
		go v.keep(ctx)
	}
	if err := s.awaitCalls(began); err != nil {
		return err
	}
	var took []time.Duration
	for _, v := range s.volumes {
		if err := s.watcher.Add(v.dir); err != nil {
			return err
		}
		s.watched.Store(v.dir, v)
		v.look()
		v.mu.Lock()
		took = append(took, v.took...)
		f.PublishErrors += len(v.failures)
		v.mu.Unlock()
	}
	f.Publish = latenciesOf(took)
	s.say("  %v, %d errors", f.Publish, f.PublishErrors)
	return nil
}

// awaitCalls waits until kubelet has called for every volume since.
func (s *scaleRun) awaitCalls(since time.Time) error {
	return cluster.Await(5*time.Minute, func() error {
		for _, v := range s.volumes {
			if !v.calledSince(since) {
				return fmt.Errorf("no successful call for Pod %s yet: %w", v.pod.Name, v.lastFailure())
			}
		}
		return nil
	})
}

// awaitStreams waits until the drivers have so many watches open.
func (s *scaleRun) awaitStreams(want int) error {
	return cluster.Await(2*time.Minute, func() error {
		all, err := s.openStreams()
		if err == nil && all != want {
			err = fmt.Errorf("%d streams are open, not %d", all, want)
		}
		return err
	})
}

func (s *scaleRun) openStreams() (all int, err error) {
	for _, node := range s.nodes {
		streams, err := node.streams()
		if err != nil {
			return 0, err
		}
		all += streams
	}
	return all, nil
}

func (s *scaleRun) restWithStreams(f *figures) (err error) {
	if err := s.awaitStreams(s.streams); err != nil {
		return err
	}
	if f.Rest, err = s.rest(); err != nil {
		return err
	}
	if f.Rest.serverMemory, err = s.serverMemory(); err != nil {
		return err
	}
	for _, node := range s.nodes {
		took, err := node.footprint()
		if err != nil {
			return err
		}
		f.Driver.IdleMiB = max(f.Driver.IdleMiB, took.IdleMiB)
	}
	return nil
}

// rest measures while nothing changes.
func (s *scaleRun) rest() (r restFigures, err error) {
	s.say("nothing changes, for %v", s.duration)
	before, server, err := s.usageOfAll()
	if err != nil {
		return r, err
	}
	began := time.Now()
	time.Sleep(s.duration)
	took := time.Since(began)
	after, serverAfter, err := s.usageOfAll()
	if err != nil {
		return r, err
	}
	streams := max(s.streams, 1)
	r.Seconds = took.Seconds()
	r.Requests = after.requests.minus(before.requests)
	r.SeenByServer = serverAfter.requests.minus(server.requests)
	r.PerVolumeHour = r.Requests.total() / float64(len(s.volumes)) / took.Hours()
	r.DriverCPUPercent = 100 * (after.cpu - before.cpu).Seconds() / took.Seconds() / float64(len(s.nodes))
	r.ServerCPUPercentPerStream = 100 * (perHour(serverAfter.cpu-server.cpu, took) - s.idleCPU).Hours() / float64(streams)
	s.say("  requests per volume-hour: %.2f (%v)", r.PerVolumeHour, r.Requests)
	return r, nil
}

// changeConnector changes the Connector of one ServiceAccount.
func (s *scaleRun) changeConnector(f *figures) (err error) {
	s.say("one Connector changes, %d times", changes)
	var volumes []*volume
	for _, v := range s.volumes {
		if v.account == 0 {
			volumes = append(volumes, v)
		}
	}
	f.Connector, err = s.change(changes, 3*time.Minute, connectorFile, volumes, s.patchConnector)
	return err
}

// changeClass changes the class that all volumes use.
func (s *scaleRun) changeClass(f *figures) (err error) {
	s.say("the class of all volumes changes, %d times", changes)
	f.Class, err = s.change(changes, 3*time.Minute, classFile, s.volumes, s.patchClass)
	return err
}

func (s *scaleRun) patchConnector(line string) error {
	patch := fmt.Appendf(nil, `{"spec":{"address":%q}}`, line)
	_, err := s.objects.Resource(connectorResource).Namespace(podNamespace).
		Patch(context.Background(), "own-0", types.MergePatchType, patch, meta.PatchOptions{})
	return err
}

func (s *scaleRun) patchClass(line string) error {
	patch := fmt.Appendf(nil, `{"spec":{"configurations":[{"name":"common","data":{%q:"%s\nproxy = {{ .connector.spec.address }}"}}]}}`, classFile, line)
	_, err := s.objects.Resource(classResource).
		Patch(context.Background(), commonClass, types.MergePatchType, patch, meta.PatchOptions{})
	return err
}

// change makes a change some times and measures from before each request until the files have it.
func (s *scaleRun) change(times int, limit time.Duration, file string, volumes []*volume, patch func(line string) error) (c changeFigures, err error) {
	before, err := s.usage()
	if err != nil {
		return c, err
	}
	var took []time.Duration
	for range times {
		one, err := s.changeOnce(limit, file, volumes, patch)
		if err != nil {
			return c, err
		}
		took = append(took, one...)
		time.Sleep(2 * time.Second) // a driver puts off a change that follows another within a second
	}
	after, err := s.usage()
	c.latencies = latenciesOf(took)
	c.Requests = after.requests.minus(before.requests)
	c.RequestsPerChange = c.Requests.total() / float64(times)
	s.say("  %v, %.0f requests each", c.latencies, c.RequestsPerChange)
	return c, err
}

func (s *scaleRun) changeOnce(limit time.Duration, file string, volumes []*volume, patch func(line string) error) (took []time.Duration, err error) {
	s.revision++
	line := fmt.Sprintf("https://own.example.com/%d", s.revision)
	began := time.Now()
	if err := patch(line); err != nil {
		return nil, err
	}
	err = cluster.Await(limit, func() error {
		took = took[:0]
		for _, v := range volumes {
			if when, ok := v.has(file, line); ok {
				took = append(took, when.Sub(began))
			}
		}
		if len(took) < len(volumes) {
			return fmt.Errorf("%d of %d volumes have the change", len(took), len(volumes))
		}
		return nil
	})
	return took, err
}

// restartServer kills the API server, and starts it again when all drivers have noticed.
func (s *scaleRun) restartServer(f *figures) error {
	s.say("the API server restarts")
	s.node.APIServer.Stop()
	if err := s.awaitStreams(0); err != nil {
		return err
	}
	before, err := s.usage()
	if err != nil {
		return err
	}
	began := time.Now()
	s.node.APIServer = s.node.Restart(s.node.APIServer)
	last, lastTime := before.requests.total(), began
	err = cluster.Await(2*time.Minute, func() error {
		open, err := s.openStreams()
		if err != nil {
			return err
		}
		if passed := time.Since(lastTime); passed > time.Second || open == s.streams {
			now, err := s.usage()
			if err != nil {
				return err
			}
			all := now.requests.total()
			f.Restart.PeakPerSecond = max(f.Restart.PeakPerSecond, (all-last)/max(passed.Seconds(), 1))
			last, lastTime = all, time.Now()
		}
		if f.Restart.ReadySeconds == 0 && s.serverReady() {
			f.Restart.ReadySeconds = time.Since(began).Seconds()
		}
		if open < s.streams {
			return fmt.Errorf("%d of %d streams are back", open, s.streams)
		}
		return nil
	})
	if err != nil {
		return err
	}
	f.Restart.StreamsSeconds = time.Since(began).Seconds()
	s.say("  all streams are back after %.1f s, at most %.0f requests a second", f.Restart.StreamsSeconds, f.Restart.PeakPerSecond)
	return cluster.Await(node.StartLimit, func() error {
		if !s.serverReady() {
			return errors.New("the API server is not ready")
		}
		return nil
	})
}

func (s *scaleRun) serverReady() bool {
	_, err := s.client.RESTClient().Get().AbsPath("/readyz").DoRaw(context.Background())
	return err == nil
}

// restartDrivers restarts a tenth of the drivers at a time, as the DaemonSet does, and changes the class when half of
// them are new. It ends when kubelet has called each new driver for all its volumes.
func (s *scaleRun) restartDrivers(f *figures) error {
	s.say("a rolling restart of all drivers")
	if err := s.readPeaks(f); err != nil {
		return err
	}
	before, server, err := s.usageOfAll()
	if err != nil {
		return err
	}
	began := time.Now()
	batches := slices.Collect(slices.Chunk(s.nodes, max(len(s.nodes)/10, 1)))
	var change errgroup.Group
	var took []time.Duration
	for i, batch := range batches {
		var restarts errgroup.Group
		for _, node := range batch {
			restarts.Go(func() error { return errors.Join(node.stop(unix.SIGTERM), node.start(s.node)) })
		}
		if err := restarts.Wait(); err != nil {
			return err
		}
		if i == len(batches)/2 {
			change.Go(func() (err error) {
				took, err = s.changeOnce(3*time.Minute, classFile, s.volumes, s.patchClass)
				return err
			})
		}
	}
	if err := errors.Join(s.awaitCalls(time.Now()), change.Wait(), s.awaitStreams(s.streams)); err != nil {
		return err
	}
	after, serverAfter, err := s.usageOfAll()
	if err != nil {
		return err
	}
	f.Rolling = rollingFigures{
		latencies: latenciesOf(took), Seconds: time.Since(began).Seconds(), Requests: after.requests.minus(before.requests),
		DriverCPUSeconds: (after.cpu - before.cpu).Seconds() / float64(len(s.nodes)), ServerCPUSeconds: (serverAfter.cpu - server.cpu).Seconds(),
	}
	s.say("  %v; %.0f requests in %.0f s", f.Rolling.latencies, f.Rolling.Requests.total(), f.Rolling.Seconds)
	return err
}

// polling takes away the right to watch, and measures what is left.
func (s *scaleRun) polling() (p *pollingFigures, err error) {
	s.say("without the right to watch")
	roles := s.client.RbacV1().ClusterRoles()
	for _, name := range []string{"connectors-csi", "connectors-connector-viewer-role"} {
		role, err := roles.Get(context.Background(), name, meta.GetOptions{})
		if err != nil {
			return nil, err
		}
		for i := range role.Rules {
			role.Rules[i].Verbs = []string{"get"}
		}
		if _, err := roles.Update(context.Background(), role, meta.UpdateOptions{}); err != nil {
			return nil, err
		}
	}
	s.node.APIServer.Stop() // ends the streams
	if err := s.awaitStreams(0); err != nil {
		return nil, err
	}
	s.node.APIServer = s.node.Restart(s.node.APIServer)
	began := time.Now()
	s.streams = 0
	if err := s.awaitCalls(began); err != nil { // from then on everything is in its rhythm
		return nil, err
	}
	p = &pollingFigures{Drivers: len(s.nodes), Volumes: len(s.volumes)}
	s.duration = max(s.duration, 2*time.Minute) // each volume is read every 60 to 90 s
	if p.Rest, err = s.rest(); err != nil {
		return nil, err
	}
	p.Class, err = s.change(1, 4*time.Minute, classFile, s.volumes, s.patchClass)
	return p, err
}

// clear removes what prepare has made.
func (s *scaleRun) clear() error {
	s.stop()
	for _, node := range s.nodes {
		node.driver.Stop()
		if err := machine.Run("umount", "--lazy", node.dir); err != nil {
			return err
		}
	}
	s.nodes, s.volumes = nil, nil
	s.watched.Clear()
	now := int64(0)
	for _, namespace := range []string{podNamespace, "connectors-system"} {
		pods := s.client.CoreV1().Pods(namespace)
		if err := pods.DeleteCollection(context.Background(), meta.DeleteOptions{GracePeriodSeconds: &now}, meta.ListOptions{}); err != nil {
			return err
		}
	}
	return nil
}
