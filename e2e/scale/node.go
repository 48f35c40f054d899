package scale

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/node"
)

// nodesDir holds a directory for each of the many nodes, as they are seen from here.
const nodesDir = "/run/scale"

// scaleNode is one of the many nodes: a process of the driver, in a mount namespace of its own, and what kubelet
// has and does for it.
type scaleNode struct {
	name    string
	dir     string // kubelet's --root-dir; the driver's process has it at the usual place
	port    int    // of the driver's --http-address
	driver  *node.Component
	volumes []*volume
	ended   spent // of the processes that have ended
}

// spent is what the driver of a node has used since the node began.
type spent struct {
	requests requests // to the API server
	cpu      time.Duration
}

// driverScript puts the driver's process where its container would be: of what is mounted for kubelet it sees only
// its own node's, by a mount that goes on from either side to the other, and its own ServiceAccount. A lazy unmount
// takes all that is mounted below with it; one by one, 1,500 volumes would take half a minute.
const driverScript = `
mount --make-private /var/lib/kubelet
mount --rbind "$1/kubelet" /var/lib/kubelet
mount --bind "$1/serviceaccount" /run/secrets/kubernetes.io/serviceaccount
mount --make-rprivate ` + nodesDir + `
umount --lazy ` + nodesDir + `
exec "$2" --http-address="$3"`

// newScaleNode makes the directories of a node. The token is that of a Pod of the driver's DaemonSet.
func newScaleNode(name string, port int, token string, ca []byte) (*scaleNode, error) {
	dir := filepath.Join(nodesDir, name)
	s := &scaleNode{name: name, dir: dir + "/kubelet", port: port}
	for _, d := range []string{s.dir, dir + "/serviceaccount", "/run/secrets/kubernetes.io/serviceaccount"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount("tmpfs", s.dir, "tmpfs", 0, "mode=0755"); err != nil {
		return nil, err
	}
	if err := unix.Mount("", s.dir, "", unix.MS_SHARED, ""); err != nil {
		return nil, err
	}
	for _, d := range []string{"pods", "plugins_registry"} {
		if err := os.Mkdir(filepath.Join(s.dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(dir+"/serviceaccount/ca.crt", ca, 0o644); err != nil {
		return nil, err
	}
	return s, os.WriteFile(dir+"/serviceaccount/token", []byte(token), 0o600)
}

// start starts the driver and registers it, as kubelet does with a socket that appears.
func (s *scaleNode) start(n *node.Node) error {
	cmd := exec.Command("unshare", "--mount", "--propagation", "unchanged", "sh", "-euc", driverScript, "sh",
		filepath.Dir(s.dir), n.Path("connectors-csi"), fmt.Sprintf("127.0.0.1:%d", s.port))
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "NODE_NAME=" + s.name, "GOMEMLIMIT=48MiB", // as in deploy.yaml
		"KUBERNETES_SERVICE_HOST=" + node.APIServiceIP, "KUBERNETES_SERVICE_PORT=443"}
	s.driver = n.Supervise(s.name, cmd)
	return cluster.Await(node.StartLimit, s.register)
}

func (s *scaleNode) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+filepath.Join(s.dir, "plugins_registry/connectors-csi-reg.sock"),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func (s *scaleNode) register() error {
	conn, err := s.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	client := registration.NewRegistrationClient(conn)
	if _, err := client.GetInfo(context.Background(), &registration.InfoRequest{}); err != nil {
		return err
	}
	_, err = client.NotifyRegistrationStatus(context.Background(), &registration.RegistrationStatus{PluginRegistered: true})
	return err
}

// stop ends the driver and keeps what it has used.
func (s *scaleNode) stop(signal unix.Signal) error {
	used, err := s.usage()
	if err != nil {
		return err
	}
	s.driver.End(signal)
	state := s.driver.Cmd.ProcessState
	s.ended = spent{used.requests, s.ended.cpu + state.UserTime() + state.SystemTime()}
	return nil
}

// usage is what the driver has used until now, renderers that have ended included.
func (s *scaleNode) usage() (spent, error) {
	families, err := s.metrics()
	if err != nil {
		return spent{}, err
	}
	cpu, err := processorTime(s.driver)
	return spent{requestsOf(families, "connectors_csi_api_requests_total").plus(s.ended.requests), s.ended.cpu + cpu}, err
}

// processorTime is what a process has used, and its children that have ended.
func processorTime(c *node.Component) (time.Duration, error) {
	process, err := procfs.NewProc(c.Cmd.Process.Pid)
	if err != nil {
		return 0, err
	}
	stat, err := process.Stat()
	ticks := time.Duration(stat.UTime) + time.Duration(stat.STime) + time.Duration(stat.CUTime) + time.Duration(stat.CSTime)
	return ticks * time.Second / 100, err // proc_pid_stat(5): USER_HZ is 100 on every architecture that Go has
}

func (s *scaleNode) metrics() (map[string]*dto.MetricFamily, error) {
	text, err := cluster.HTTPGet(fmt.Sprintf("http://127.0.0.1:%d/metrics", s.port))
	if err != nil {
		return nil, err
	}
	return parseMetrics(text)
}

func parseMetrics(text string) (map[string]*dto.MetricFamily, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(strings.NewReader(text))
}

// streams is the number of the driver's open watches.
func (s *scaleNode) streams() (int, error) {
	families, err := s.metrics()
	if err != nil {
		return 0, err
	}
	gauge := families["connectors_csi_watches"]
	if gauge == nil {
		return 0, fmt.Errorf("the driver has no metric connectors_csi_watches")
	}
	return int(gauge.Metric[0].GetGauge().GetValue()), nil
}

// footprint is what the driver's process takes of the node, without its renderers.
type footprint struct {
	IdleMiB     float64 `json:"residentIdleMiB"`
	PeakMiB     float64 `json:"residentPeakMiB"`
	Goroutines  int     `json:"goroutines"`
	Threads     int     `json:"threads"`
	Descriptors int     `json:"descriptors"`
}

func (f footprint) String() string {
	return fmt.Sprintf("%.1f MiB idle, %.1f MiB at the peak; %d goroutines, %d threads, %d descriptors",
		f.IdleMiB, f.PeakMiB, f.Goroutines, f.Threads, f.Descriptors)
}

func (s *scaleNode) footprint() (footprint, error) {
	process, err := procfs.NewProc(s.driver.Cmd.Process.Pid)
	if err != nil {
		return footprint{}, err
	}
	status, err := process.NewStatus()
	if err != nil {
		return footprint{}, err
	}
	stat, err := process.Stat()
	if err != nil {
		return footprint{}, err
	}
	descriptors, err := process.FileDescriptorsLen()
	const mebibyte = 1 << 20
	return footprint{IdleMiB: float64(status.VmRSS) / mebibyte, PeakMiB: float64(status.VmHWM) / mebibyte,
		Threads: stat.NumThreads, Descriptors: descriptors}, err
}

var goroutineLine = regexp.MustCompile(`(?m)^goroutine \d+ `)

// quit ends the driver in the way that makes Go's runtime print all goroutines, and counts them.
func (s *scaleNode) quit() (goroutines int, err error) {
	before, err := os.ReadFile(s.driver.Log)
	if err != nil {
		return 0, err
	}
	s.driver.End(unix.SIGQUIT)
	after, err := os.ReadFile(s.driver.Log)
	if err != nil {
		return 0, err
	}
	return len(goroutineLine.FindAll(after[len(before):], -1)), nil
}

// volume is a volume of a Pod that exists in the API server only.
type volume struct {
	node    *scaleNode
	client  kubernetes.Interface
	pod     *core.Pod
	account int    // of the ServiceAccount, and of the Connector that only it uses
	dir     string // where kubelet sees its files

	mu       sync.Mutex
	token    *authentication.TokenRequestStatus
	renew    time.Time
	called   time.Time       // when the last successful call ended
	took     []time.Duration // of all calls
	failures []error
	files    map[string]firstLine // by name
}

// firstLine is that of a file, and when it came.
type firstLine struct {
	line string
	when time.Time
}

const targetFormat = "%s/pods/%s/volumes/kubernetes.io~csi/config/mount"

// keep calls the driver for the volume, as kubelet does: 60 to 90 seconds after a call, or sooner if it failed, at
// growing intervals.
func (v *volume) keep(ctx context.Context) {
	var retry time.Duration
	for {
		err := v.publish(ctx)
		v.mu.Lock()
		wait := time.Minute + rand.N(30*time.Second)
		if err == nil {
			v.called, retry = time.Now(), 0
		} else {
			v.failures = append(v.failures, err)
			retry = min(max(2*retry, 500*time.Millisecond), 2*time.Minute)
			wait = retry
		}
		v.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (v *volume) publish(ctx context.Context) error {
	token, err := v.podToken(ctx)
	if err != nil {
		return err
	}
	tokens, err := json.Marshal(map[string]any{"": map[string]any{"token": token.Token, "expirationTimestamp": token.ExpirationTimestamp}})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(v.dir), 0o750); err != nil {
		return err
	}
	conn, err := v.node.dial() // for each call, as kubelet does
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute) // kubelet's limit
	defer cancel()
	target := fmt.Sprintf(targetFormat, "/var/lib/kubelet", v.pod.UID)
	began := time.Now()
	_, err = csi.NewNodeClient(conn).NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
		VolumeId:   fmt.Sprintf("csi-%x", sha256.Sum256([]byte(target))),
		TargetPath: target,
		VolumeCapability: &csi.VolumeCapability{
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
			AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		Readonly: true,
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/pod.name": v.pod.Name, "csi.storage.k8s.io/pod.namespace": v.pod.Namespace,
			"csi.storage.k8s.io/pod.uid":             string(v.pod.UID),
			"csi.storage.k8s.io/serviceAccount.name": v.pod.Spec.ServiceAccountName,
			"csi.storage.k8s.io/ephemeral":           "true",
			"connectors":                             fmt.Sprintf("common,own-%d", v.account),
			"configuration.names":                    "common,own",
		},
		Secrets: map[string]string{"csi.storage.k8s.io/serviceAccount.tokens": string(tokens)},
	})
	v.mu.Lock()
	v.took = append(v.took, time.Since(began))
	v.mu.Unlock()
	return err
}

// podToken is a token that is bound to the Pod; after 80 % of its lifetime it is a new one.
func (v *volume) podToken(ctx context.Context) (*authentication.TokenRequestStatus, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Now().Before(v.renew) {
		return v.token, nil
	}
	began := time.Now()
	token, err := cluster.RequestBoundToken(ctx, v.client, v.pod, 30*time.Minute) // as tokenRequests in deploy.yaml has it
	switch {
	case err == nil:
		v.token, v.renew = token, began.Add(time.Until(token.ExpirationTimestamp.Time)*8/10)
	case v.token == nil:
		return nil, err
	}
	return v.token, nil // while the API server is away, the old one does
}

// look sees whether files have changed.
func (v *volume) look() {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, name := range []string{connectorFile, classFile} {
		content, _ := os.ReadFile(filepath.Join(v.dir, name)) // none is no line
		if line, _, _ := strings.Cut(string(content), "\n"); line != v.files[name].line {
			v.files[name] = firstLine{line, time.Now()}
		}
	}
}

// calledSince reports whether a call has succeeded since.
func (v *volume) calledSince(when time.Time) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.called.After(when)
}

// lastFailure is that of the last call that failed, if any did.
func (v *volume) lastFailure() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.failures) == 0 {
		return errors.New("none has failed")
	}
	return v.failures[len(v.failures)-1]
}

// has reports whether a file has this first line, and since when.
func (v *volume) has(file, line string) (since time.Time, ok bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.files[file].when, v.files[file].line == line
}
