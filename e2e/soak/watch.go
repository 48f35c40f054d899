package soak

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
)

// watch looks, without the API server, at what runs on the node. It has a reader for each container of the soak's Pods.
type watch struct {
	node   *node.Node
	before map[string]bool // directories of Pods that were there before

	mu         sync.Mutex
	containers map[string]container // that it has seen, by ID
	lines      map[string]seen      // that readers have read last, by namespace/name
	expected   map[string]int       // restarts of the driver, by its Pod's uid
	killed     time.Time            // when kubelet was killed last
	offsets    map[string]int64     // up to which logs were read
	wrongs     []string
	reads      int
	overtaken  int // reads that an update came before, and that were done again
	peak, most int64
}

// container is what containerd's bundle says of one.
type container struct {
	id, pod, uid, name string // the Pod with its namespace
	pid                int
	since              time.Time // when it was seen first
}

// seen is what a reader has read, and when.
type seen struct {
	line string
	when time.Time
}

// startOfContainer is how long containerd may take to start a container, on a busy machine.
const startOfContainer = 10 * time.Second

func newWatch(n *node.Node) *watch {
	w := &watch{
		node: n, before: map[string]bool{}, containers: map[string]container{}, lines: map[string]seen{},
		expected: map[string]int{}, offsets: map[string]int64{},
	}
	entries, _ := os.ReadDir(cluster.KubeletPods)
	for _, e := range entries {
		w.before[e.Name()] = true
	}
	return w
}

// start looks until the function that it returns is called.
func (w *watch) start() (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for n := 0; ; n++ {
			select {
			case <-end:
				return
			case <-time.After(200 * time.Millisecond):
			}
			w.look()
			if n%25 == 0 {
				w.readLogs()
			}
		}
	}()
	return sync.OnceFunc(func() { close(end); <-ended })
}

func (w *watch) wrong(format string, a ...any) {
	text := fmt.Sprintf(format, a...)
	fmt.Println("WRONG:", text)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wrongs = append(w.wrongs, text)
}

// look finds new containers, and the most memory that the driver has had.
func (w *watch) look() {
	for _, c := range running() {
		if !c.started() {
			continue
		}
		w.mu.Lock()
		old, known := w.containers[c.id]
		c.since = time.Now()
		if known {
			c.since = old.since
		}
		again := 0
		for _, other := range w.containers {
			// With kubelet goes what containerd was starting for it, though the process may have begun.
			lost := w.killed.Sub(other.since).Abs() < startOfContainer
			if !known && other.uid == c.uid && other.name == c.name && !lost {
				again++
			}
		}
		w.containers[c.id] = c
		allowed := w.expected[c.uid]
		w.mu.Unlock()
		isDriver := c.name == "csi-driver"
		if !known && again > allowed {
			w.wrong("container %s of Pod %s was restarted, which nobody did", c.name, c.pod)
		}
		if !known && !isDriver {
			go w.follow(c)
		}
		if isDriver {
			peak, err := w.node.CgroupValue(c.id, "memory/memory.max_usage_in_bytes", "memory.peak")
			most, _ := w.node.CgroupValue(c.id, "memory/memory.limit_in_bytes", "memory.max")
			w.mu.Lock()
			// A share of the limit is compared, since the old driver has another.
			if err == nil && most > 0 && (w.most == 0 || float64(peak)/float64(most) > float64(w.peak)/float64(w.most)) {
				w.peak, w.most = peak, most
			}
			w.mu.Unlock()
		}
	}
}

// running returns the containers of the driver and of the soak's Pods whose processes live.
func running() (found []container) {
	dirs, _ := os.ReadDir(cluster.Bundles)
	for _, dir := range dirs {
		var spec struct{ Annotations map[string]string }
		content, err := os.ReadFile(filepath.Join(cluster.Bundles, dir.Name(), "config.json"))
		if err != nil || json.Unmarshal(content, &spec) != nil {
			continue // it is being made or removed
		}
		of := func(key string) string { return spec.Annotations["io.kubernetes.cri."+key] }
		namespace, name := of("sandbox-namespace"), of("container-name")
		pid, err := cluster.ContainerProcess(dir.Name())
		c := container{id: dir.Name(), pod: namespace + "/" + of("sandbox-name"), uid: of("sandbox-uid"), name: name,
			pid: pid}
		if name != "" && err == nil && c.lives() && (slices.Contains(podNamespaces, namespace) || name == "csi-driver") {
			found = append(found, c)
		}
	}
	return found
}

// lives reports whether the container's process still has a root directory, which is the first thing that it loses.
func (c container) lives() bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/root", c.pid))
	return err == nil
}

// started reports whether the process has become the container's own: before that it is runc, which sees all mounts.
// When kubelet is killed in between, containerd gives the container up, and kubelet's next attempt is no restart.
func (c container) started() bool {
	command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", c.pid))
	return strings.HasPrefix(string(command), "sleep\x00") || strings.HasPrefix(string(command), "/connectors-csi\x00")
}

// follow reads the volume of a container over and over, as a process in it would, until it ends.
func (w *watch) follow(c container) {
	volume, failures := fmt.Sprintf("/proc/%d/root/volume", c.pid), 0
	for ; c.lives(); time.Sleep(50 * time.Millisecond) { // about as often as a busy client reads
		if !c.started() {
			continue
		}
		before, _ := os.Readlink(volume + "/..data")
		line, err := readVolume(volume, c.uid)
		after, _ := os.Readlink(volume + "/..data")
		switch {
		case !c.lives():
			return
		case errors.Is(err, fs.ErrNotExist) && before != after:
			w.mu.Lock()
			w.overtaken++
			w.mu.Unlock()
			continue
		case err != nil:
			w.wrong("Pod %s: %v (..data was %q, then %q)", c.pod, err, before, after)
			if failures++; failures == 3 {
				return // that says enough
			}
		}
		w.mu.Lock()
		w.reads++
		w.lines[c.pod] = seen{line, time.Now()}
		w.mu.Unlock()
	}
}

// readVolume reads one generation, checks that it is whole, and returns the line that its files have in common, but
// for the token.
func readVolume(volume, uid string) (string, error) {
	dir, err := os.Open(volume + "/..data/.")
	if err != nil {
		return "", err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return "", err
	}
	here := fmt.Sprintf("/proc/self/fd/%d/", dir.Fd())
	first, err := readRecord(here + "first")
	if err != nil {
		return "", err
	}
	words := strings.Fields(first)
	second, err := readRecord(here + words[0])
	switch {
	case err != nil && errors.Is(err, fs.ErrNotExist) && len(names) == 2 && !slices.Contains(names, words[0]):
		return "", fmt.Errorf("a mixed generation: %q with a file of %s", names, words[0])
	case err != nil:
		return "", err
	case first != second:
		return "", errors.New("a mixed generation: its files begin with different lines")
	}
	token, err := cluster.ParseClaims(words[len(words)-1])
	if err != nil || token.Kubernetes.Pod.UID != uid || time.Now().Unix() > token.Expires {
		return "", fmt.Errorf("the token is none, or not that of this Pod, or expired: %v", err)
	}
	// The visible file, and where there is one that of a subPath, may be of another generation, but are whole.
	if _, err := readRecord(volume + "/first"); err != nil {
		return "", err
	}
	if _, err := readRecord(filepath.Dir(volume) + "/first"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return strings.Join(words[:len(words)-1], " "), nil
}

var recordLine = regexp.MustCompile(`^revision-\d+( https://[a-z0-9.-]+)+ \S+\n$`)

// readRecord returns the line with which a file begins and ends.
func readRecord(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return "", err
	}
	head := make([]byte, 8<<10)
	n, _ := file.ReadAt(head, 0)
	line, _, _ := strings.Cut(string(head[:n]), "\n")
	line += "\n"
	if !recordLine.MatchString(line) {
		return "", fmt.Errorf("%s of %d bytes does not begin with a whole line", filepath.Base(path), info.Size())
	}
	tail := make([]byte, len(line))
	if _, err := file.ReadAt(tail, info.Size()-int64(len(tail))); err != nil || string(tail) != line {
		return "", fmt.Errorf("%s of %d bytes does not end with the line that it begins with (%v)", filepath.Base(path),
			info.Size(), err)
	}
	return line, nil
}

// latest returns what the reader of a running Pod has read in the last seconds.
func (w *watch) latest(pod string) string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if last := w.lines[pod]; time.Since(last.when) < 2*time.Second {
		return last.line
	}
	return ""
}

// secrets are the beginning of a token, in base64 as well, and the filling of a file.
var secrets = regexp.MustCompile(`eyJ[\w-]{20,}|ZXlK[\w+/]{20,}|x{64}`)

// readLogs looks for secrets in what was added to the logs of the components and of all containers.
func (w *watch) readLogs() {
	logs, _ := filepath.Glob(w.node.Path("*.log"))
	pods, _ := filepath.Glob(w.node.Path("pods/*/*/*.log"))
	for _, path := range append(logs, pods...) {
		file, err := os.Open(path)
		if err != nil {
			continue // its Pod is deleted
		}
		w.mu.Lock()
		from := w.offsets[path]
		w.mu.Unlock()
		var added []byte
		if info, err := file.Stat(); err == nil && info.Size() > from {
			added = make([]byte, info.Size()-from)
			n, _ := file.ReadAt(added, from)
			added = added[:n]
		}
		file.Close()
		// What is not a whole line yet is read again.
		whole := strings.LastIndexByte(string(added), '\n') + 1
		w.mu.Lock()
		w.offsets[path] = from + int64(whole)
		w.mu.Unlock()
		if at := secrets.FindIndex(added[:whole]); at != nil {
			w.wrong("a token or a file's content is in %s after byte %d", path, from+int64(at[0]))
		}
	}
}

// driver returns the driver's container that runs.
func (w *watch) driver() (container, error) {
	for _, c := range running() {
		if c.name == "csi-driver" {
			return c, nil
		}
	}
	return container{}, errors.New("no driver runs")
}

func (w *watch) kubeletIsKilled() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.killed = time.Now()
}

func (w *watch) expectRestart() {
	if c, err := w.driver(); err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.expected[c.uid]++
	}
}

// driverProcess returns the driver's process, its shim's, or that of one of its renderers; 0 if there is none.
func (w *watch) driverProcess(which string) int {
	c, err := w.driver()
	if err != nil {
		return 0
	}
	parents := parents()
	switch which {
	case "shim":
		return parents[c.pid]
	case "renderer":
		for pid, parent := range parents {
			if parent == c.pid {
				return pid
			}
		}
		return 0
	}
	return c.pid
}

// parents returns the parent of each process.
func parents() map[int]int {
	found := map[int]int{}
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		content, _ := os.ReadFile(path)
		// "12 (name) S 1 …"
		_, rest, _ := strings.Cut(string(content), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			found[pid], _ = strconv.Atoi(fields[1])
		}
	}
	return found
}

// driverReady asks the driver itself.
func (w *watch) driverReady() error {
	_, err := w.driverPage("/readyz")
	return err
}

func (w *watch) driverPage(page string) (string, error) {
	ip, err := cluster.Kubectl("--namespace=connectors-system", "get", "pods", driverPods,
		"--output=jsonpath={.items[*].status.podIP}", "--request-timeout=5s")
	if err != nil {
		return "", err
	}
	if len(strings.Fields(ip)) != 1 {
		return "", fmt.Errorf("the driver's addresses are %q", ip)
	}
	return cluster.HTTPGet("http://" + ip + ":9808" + page)
}

// nothingLeft looks for what deleted Pods may leave: directories, mounts on the node and in the driver, streams,
// processes.
func (w *watch) nothingLeft() error {
	c, err := w.driver()
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(cluster.KubeletPods)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !w.before[e.Name()] && e.Name() != c.uid {
			return fmt.Errorf("the directory of Pod %s is left", e.Name())
		}
	}
	for _, who := range []string{"self", strconv.Itoa(c.pid)} {
		table, err := os.ReadFile("/proc/" + who + "/mountinfo")
		if err != nil {
			return err
		}
		if n := strings.Count(string(table), " - tmpfs connectors-csi "); n > 0 {
			return fmt.Errorf("%d volumes are mounted still, in the namespace of process %s", n, who)
		}
	}
	parents := parents()
	for _, pid := range slices.Sorted(maps.Keys(parents)) {
		command, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if pid != c.pid && (strings.HasPrefix(string(command), "/connectors-csi\x00") ||
			strings.Contains(string(command), "renderer\x00")) {
			return fmt.Errorf("process %d of the driver is left: %q, child of %d", pid, command, parents[pid])
		}
	}
	page, err := w.driverPage("/metrics")
	if err != nil {
		return err
	}
	for _, name := range []string{"connectors_csi_volumes", "connectors_csi_watches"} {
		if !strings.Contains(page, "\n"+name+" 0\n") {
			return fmt.Errorf("%s is not 0", name)
		}
	}
	return nil
}

// held is what a driver's process holds.
type held struct{ descriptors, threads, goroutines int }

func (h held) String() string {
	return fmt.Sprintf("%d descriptors, %d threads and %d goroutines", h.descriptors, h.threads, h.goroutines)
}

var goroutineLogged = regexp.MustCompile(`(?m)^\S+ stderr F goroutine \d+ `)

// measureDriver counts what the driver holds. It ends the driver with SIGQUIT, at which Go writes what all goroutines
// do to the log.
func (w *watch) measureDriver() (held, error) {
	c, err := w.driver()
	if err != nil {
		return held{}, err
	}
	descriptors, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.pid))
	if err != nil {
		return held{}, err
	}
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", c.pid))
	if err != nil {
		return held{}, err
	}
	logs, err := filepath.Glob(w.node.Path("pods/*_" + c.uid + "/csi-driver/*.log"))
	if err != nil || len(logs) == 0 {
		return held{}, fmt.Errorf("the driver's logs are %q (%v)", logs, err)
	}
	newest := slices.MaxFunc(logs, func(a, b string) int { // 9.log, 10.log
		return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b))
	})
	w.expectRestart()
	if err := unix.Kill(c.pid, unix.SIGQUIT); err != nil {
		return held{}, err
	}
	h := held{len(descriptors), len(threads), 0}
	err = cluster.Await(backLimit, func() error {
		if machine.Exists(filepath.Join(cluster.Bundles, c.id)) { // containerd removes it when it has all of the log
			return errors.New("the driver has not ended")
		}
		return nil
	})
	if err != nil {
		return h, err
	}
	log, err := os.ReadFile(newest)
	if h.goroutines = len(goroutineLogged.FindAll(log, -1)); err == nil && h.goroutines == 0 {
		err = errors.New("the driver did not write its goroutines")
	}
	return h, err
}

// summary prints what was looked at, and returns what was wrong.
func (w *watch) summary() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	fmt.Printf("  %d volumes read in %d containers; %d reads were overtaken by an update and repeated; %d logs searched\n",
		w.reads, len(w.containers), w.overtaken, len(w.offsets))
	fmt.Printf("  the driver had at most %d of %d MiB of memory\n", w.peak>>20, w.most>>20)
	if w.reads == 0 || w.peak == 0 {
		w.wrongs = append(w.wrongs, "nothing was read or measured")
	}
	if len(w.wrongs) > 0 {
		return fmt.Errorf("%d things were wrong:\n  %s", len(w.wrongs), strings.Join(w.wrongs, "\n  "))
	}
	return nil
}
