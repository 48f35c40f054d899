package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	driverName = "connectors-csi"

	// publishTimeout ends a publish well before kubelet's two minutes do, so that kubelet hears the reason.
	publishTimeout = 60 * time.Second

	// kubeletTokenLifetime is what tokenRequests of the CSIDriver object in deploy.yaml asks for; a volume
	// that wants no other lifetime uses the token that kubelet passes.
	kubeletTokenLifetime = 30 * time.Minute
	minTokenLifetime     = 10 * time.Minute // the API server's own limit for a TokenRequest
	maxTokenLifetime     = 24 * time.Hour
	extendedLifetime     = 3607 * time.Second // the API server makes a year of it, for old clients

	defaultMode = 0o444 // of files, with which everyone may read them
	groupMode   = 0o440 // with an fsGroup

	maxMessageBytes = 900 // an event may hold 1,024, about a hundred of them kubelet's

	// What the volumeAttributes of a new volume may hold.
	maxAttributeBytes = 32 << 10 // keys and values together
	maxConnectors     = 32
	maxConfigurations = 64  // and as many exclusions
	maxNameBytes      = 253 // as Kubernetes has it for names of objects

	// What the process keeps of volumes for pushes: attributes and tokens, of the volumes of a Pod and of all.
	maxPodKeptBytes = 128 << 10
	maxKeptBytes    = 8 << 20

	// pushInterval is the least time between two pushes of a volume. It doubles while they fail, to 32 times
	// as much.
	pushInterval = time.Second
	// sweepDelay is how long the old files of a volume stay beside the new ones, for whoever is just opening one.
	sweepDelay = time.Second
	// retryInterval is how long the driver waits with the next try to renew a token.
	retryInterval = time.Minute

	kubeletKeyPrefix = "csi.storage.k8s.io/" // keys of volume_context and secrets that are kubelet's
	tokensKey        = kubeletKeyPrefix + "serviceAccount.tokens"
)

// driver serves the Identity and Node services of the Container Storage Interface (CSI), version 1. RPCs that
// it does not implement answer Unimplemented.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	driverConfig

	kube      *kube
	renderers *renderers
	budget    *budget
	metrics   *metrics

	mu      sync.Mutex         // guards what follows
	volumes map[string]*volume // by target path
	kept    map[string]int     // bytes that are kept of volumes, by the Pod's uid; of all by ""
	closed  bool
}

// driverConfig is what a driver needs to know of its surroundings.
type driverConfig struct {
	nodeName      string
	podsDir       string // kubelet's; every target path is below it
	builtInFiles  bool
	volumesBudget int64  // in bytes
	binary        string // this program, which is the renderers' as well
	log           *slog.Logger
	api           kubeConfig
}

// newDriver makes a driver that goes on with the volumes that another process of it has left mounted.
func newDriver(c driverConfig) (*driver, error) {
	b, left, err := newBudget(c.podsDir, c.volumesBudget)
	if err != nil {
		return nil, err
	}
	m := newMetrics(b)
	c.api.log, c.api.metrics = c.log, m
	k, err := newKube(c.api)
	if err != nil {
		return nil, err
	}
	d := &driver{driverConfig: c, kube: k, renderers: newRenderers(c.binary, c.log, m), budget: b,
		metrics: m, volumes: map[string]*volume{}, kept: map[string]int{}}
	for target, memory := range left {
		d.newVolume(target, memory).published = true
	}
	return d, nil
}

// volume is the record of a target path, which the process has while somebody works on it and as long as it is
// mounted. After a restart it has no publication until kubelet calls.
type volume struct {
	// These never change; what memory and subscriber hold has guards of its own.
	target     string
	memory     *footprint
	subscriber subscriber
	turn       chan struct{} // has an element while somebody works on the volume

	// Whoever has the turn may use these.
	published   bool              // by this driver
	publication *publication      // kubelet's last that was valid; nil if there was no room to keep it
	inputs      [sha256.Size]byte // the digest of all that the files were made from
	token       issuedToken       // that the driver asked for

	// driver.mu guards the rest.
	called   bool               // a call of kubelet waits for the turn, or has it
	stop     context.CancelFunc // ends the push that has the turn; not nil just while inTurn has it
	kept     int                // bytes
	due      time.Time          // when the change came that the next push is for; zero if none is to come
	pushed   time.Time          // when the last push began that was no renewal
	failures int                // of the last such pushes
	// These timers are for the next push, the removal of old files and the renewal of the token.
	pushTimer, sweepTimer, renewTimer *time.Timer
}

func (d *driver) GetPluginInfo(context.Context,
	*csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: driverName, VendorVersion: version}, nil
}

func (d *driver) GetPluginCapabilities(context.Context,
	*csi.GetPluginCapabilitiesRequest) (*csi.GetPluginCapabilitiesResponse, error) {
	return &csi.GetPluginCapabilitiesResponse{}, nil // there is no controller
}

func (d *driver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (d *driver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{NodeId: d.nodeName}, nil
}

// NodeGetCapabilities announces VOLUME_MOUNT_GROUP, with which kubelet passes the Pod's fsGroup: kubelet
// itself applies none to a read-only volume.
func (d *driver) NodeGetCapabilities(context.Context,
	*csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	rpc := &csi.NodeServiceCapability_RPC{Type: csi.NodeServiceCapability_RPC_VOLUME_MOUNT_GROUP}
	return &csi.NodeGetCapabilitiesResponse{Capabilities: []*csi.NodeServiceCapability{
		{Type: &csi.NodeServiceCapability_Rpc{Rpc: rpc}},
	}}, nil
}

// NodePublishVolume mounts a volume, or brings the files of a mounted one up to date:
//
//  1. validate the request
//  2. take the turn of the target path; refuse to a new volume what a mounted one goes on with
//  3. read the Connectors and their classes, and get a token
//  4. let a renderer make the files, in memory, unless they were made from just this before
//  5. mount them, or update the mount in place
//
// Until step 5 nothing is touched: a first publish that fails leaves nothing behind, since kubelet sends no
// Unpublish after a final error, and a republish that fails leaves the last good files, or just the new ones.
func (d *driver) NodePublishVolume(ctx context.Context,
	request *csi.NodePublishVolumeRequest) (_ *csi.NodePublishVolumeResponse, err error) {
	start, changed := time.Now(), false
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	var p *publication
	defer func() {
		err = answer(err)
		d.metrics.inc(publishTotal, "code", status.Code(err).String())
		d.metrics.observe(publishDuration, time.Since(start))
		if changed || err != nil {
			d.logPublish("publish", p, err, start)
		}
	}()

	// 1. validate
	if p, err = d.validate(request); err != nil {
		return nil, err
	}

	// 2. take the turn
	v, err := d.takeTurn(ctx, p.target, p.pod.uid)
	if err != nil {
		return nil, err
	}
	defer d.endTurn(v)
	at, err := d.budget.look(p.target, v.memory)
	if err != nil {
		return nil, mountError(err)
	}
	if err := d.readAttributes(v, p, request, at); err != nil {
		return nil, podError(err)
	}
	switch {
	case v.published && at.mounted:
		d.keep(v, p) // also when the call fails later on, its token is the newest
	case v.published: // somebody else has unmounted it
		d.forget(v)
	}

	// 3. to 5.
	if changed, err = d.publish(ctx, v, p, at, false); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish takes the steps 3 to 5 of NodePublishVolume, for a call of kubelet or a push. A renewal gets a new
// token alone: it reads nothing that the volume's files were made from. The caller has the volume's turn.
func (d *driver) publish(ctx context.Context, v *volume, p *publication, at mountState,
	renewal bool) (changed bool, err error) {
	// 3. read. An answer to a Connector's first reader shows that the API server takes the Pod's token, of
	// whose claims chooseToken makes use; later tokens are believed, since kubelet alone may call.
	l := d.kube.begin(&lookup{subscriber: &v.subscriber, pod: p.pod, token: p.token, first: !at.complete,
		renewal: renewal})
	defer l.end()
	defer func() { // before the lookup ends
		if v.publication != nil && l.subscribe(err == nil) {
			d.pushSoon(v)
		}
	}()
	connector := func(ref reference) (*apiObject, error) { return l.connector(ctx, ref) }
	class := func(name string) (*apiObject, error) { return l.class(ctx, name) }
	sources, err := collectSources(p.pod, p.attributes.connectors, connector, class)
	if err != nil {
		return false, err
	}
	j := job{sources: sources, selection: p.attributes.selection, key: inputsDigest(p, sources)}
	if j.token, err = d.chooseToken(ctx, l, v, p, j); err != nil {
		return false, err
	}

	// 4. render
	inputs := sha256.Sum256(fmt.Appendf(nil, "%x %v %s", j.key, p.permissions, j.token))
	if at.complete && v.inputs == inputs {
		return false, nil
	}
	f, err := d.renderers.render(ctx, p.pod.namespace, j)
	if err != nil {
		d.metrics.inc(templateFailuresTotal)
		return false, renderError(err)
	}

	// 5. mount or update
	v.inputs = [sha256.Size]byte{} // of an update that fails halfway nothing is known
	if changed, err = d.budget.publish(p.target, v.memory, at, f, p.permissions); err != nil {
		return changed, mountError(err)
	}
	v.published, v.inputs = true, inputs
	if v.publication != p {
		d.keep(v, p)
	}
	d.schedule(v, changed && at.complete)
	return changed, nil
}

// schedule starts the timers after a publish that succeeded: for the old files, if there are any, and for the
// next token. The caller has the volume's turn.
func (d *driver) schedule(v *volume, oldFiles bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v.failures = 0
	if oldFiles {
		v.sweepTimer = restart(v.sweepTimer, sweepDelay, func() { d.inTurn(v, func(context.Context) { d.sweep(v) }) })
	}
	if v.token.value != "" {
		v.renewTimer = restart(v.renewTimer, time.Until(v.token.renew), func() { d.push(v, true) })
	}
}

// restart stops a timer, if there is one, and starts another.
func restart(t *time.Timer, after time.Duration, do func()) *time.Timer {
	if t != nil {
		t.Stop()
	}
	return time.AfterFunc(after, do)
}

// sweep removes the generation that an update has left to those who were following ..data into it.
func (d *driver) sweep(v *volume) {
	if at, err := look(v.target); err != nil || !at.complete || !v.published { // the record may be dropped
		return
	}
	if err := d.budget.sweep(v.target, v.memory); err != nil {
		d.log.Warn("old files stay until the next change", "volume", v.target, "error", err)
	}
}

// inputsDigest returns the digest of all that the files are made from, but for the token and the permissions.
func inputsDigest(p *publication, sources []source) [sha256.Size]byte {
	h := sha256.New()
	h.Write(p.attributes.digest[:])
	for _, s := range sources {
		fmt.Fprintf(h, " %q %q", s.connector.version, s.class.version)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// NodeUnpublishVolume unmounts a volume and removes its target path. It needs no record of the volume and no
// API server, and succeeds where there is nothing to do.
func (d *driver) NodeUnpublishVolume(ctx context.Context,
	request *csi.NodeUnpublishVolumeRequest) (_ *csi.NodeUnpublishVolumeResponse, err error) {
	start, changed, pod := time.Now(), false, ""
	defer func() {
		err = answer(err)
		d.metrics.inc(unpublishTotal, "code", status.Code(err).String())
		if changed || err != nil {
			d.logCall("unpublish", err, "pod", pod, "volume", volumeName(request.TargetPath),
				"duration", time.Since(start))
		}
	}()
	if request.VolumeId == "" {
		return nil, failuref(codes.InvalidArgument, "volume_id is missing")
	}
	if pod, err = d.checkTarget(request.TargetPath); err != nil { // its uid may be all that is known of the Pod
		return nil, err
	}
	v, err := d.takeTurn(ctx, request.TargetPath, pod)
	if err != nil {
		return nil, err
	}
	defer d.endTurn(v)
	if v.publication != nil {
		pod = v.publication.pod.namespace + "/" + v.publication.pod.name
	}
	if changed, err = d.budget.unpublish(request.TargetPath, v.memory); err != nil {
		return nil, mountError(err)
	}
	d.forget(v)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// publication is a validated request to publish. It is kept as long as the volume, so it holds nothing more
// of the request than is needed. Nobody may change what its attributes refer to.
type publication struct {
	target      string
	pod         podIdentity
	token       string // the Pod's, from kubelet
	attributes  attributes
	permissions permissions
}

// size returns the bytes that count of it: the text of its attributes, and its token.
func (p *publication) size() int { return p.attributes.size + len(p.token) }

// logPublish writes the line of a publish or a push.
func (d *driver) logPublish(call string, p *publication, err error, start time.Time) {
	d.logCall(call, err, "pod", p.pod.namespace+"/"+p.pod.name, "volume", volumeName(p.target),
		"connectors", fmt.Sprint(p.attributes.connectors), "duration", time.Since(start))
}

// validate checks what can be checked without reading anything. With an error it returns what is known of the
// Pod.
func (d *driver) validate(request *csi.NodePublishVolumeRequest) (*publication, error) {
	p := &publication{target: request.TargetPath, permissions: permissions{mode: defaultMode}}
	// These are for the log only, until the token's claims are known.
	p.pod.namespace, p.pod.name = request.VolumeContext[kubeletKeyPrefix+"pod.namespace"],
		request.VolumeContext[kubeletKeyPrefix+"pod.name"]
	fail := func(format string, a ...any) (*publication, error) {
		return p, failuref(codes.InvalidArgument, format, a...)
	}
	uid, err := d.checkTarget(request.TargetPath)
	switch {
	case request.VolumeId == "":
		return fail("volume_id is missing")
	case err != nil:
		return p, err
	case request.VolumeCapability.GetMount() == nil:
		return fail("volume_capability must be of type mount")
	case !request.Readonly:
		return fail("the volume must be read-only: set csi.readOnly: true in the Pod's volume")
	}
	if group := request.VolumeCapability.GetMount().VolumeMountGroup; group != "" {
		gid, err := strconv.ParseUint(group, 10, 31)
		if err != nil {
			return fail("volume_mount_group %q is not a group ID", cut(group, maxQuotedBytes))
		}
		p.permissions = permissions{gid: int(gid), mode: groupMode}
	}
	if p.token, err = podToken(request); err != nil {
		return p, err
	}
	pod, err := parseIdentity(p.token)
	if err != nil {
		return fail("%v", err)
	}
	p.pod = pod
	return p, checkIdentity(p.pod, uid, request.VolumeContext)
}

// readAttributes sets the publication's attributes, and its permissions by them. It is stricter with a new
// volume: one that another release of the driver has mounted goes on.
func (d *driver) readAttributes(v *volume, p *publication, request *csi.NodePublishVolumeRequest,
	at mountState) (err error) {
	if p.attributes, err = d.attributesFor(v, request, p.pod.namespace); err != nil {
		return err
	}
	if !at.complete {
		if err := checkNew(request, p.attributes); err != nil {
			return err
		}
	}
	p.attributes.lifetime = min(p.attributes.lifetime, maxTokenLifetime)
	p.permissions.uid, p.permissions.mode = p.attributes.owner, cmp.Or(p.attributes.mode, p.permissions.mode)
	return nil
}

// attributesFor returns the volume's attributes. A Pod cannot change them, so most calls bring known ones.
func (d *driver) attributesFor(v *volume, request *csi.NodePublishVolumeRequest,
	podNamespace string) (attributes, error) {
	digest := sha256.New()
	fmt.Fprintf(digest, "%q", podNamespace)
	for _, key := range slices.Sorted(maps.Keys(request.VolumeContext)) {
		if value := request.VolumeContext[key]; !strings.HasPrefix(key, kubeletKeyPrefix) {
			fmt.Fprintf(digest, " %d %d %s%s", len(key), len(value), key, value)
		}
	}
	made := [sha256.Size]byte(digest.Sum(nil))
	if v.publication != nil && v.publication.attributes.digest == made {
		return v.publication.attributes, nil
	}
	a, err := parseAttributes(request.VolumeContext, podNamespace, d.builtInFiles)
	a.digest = made
	return a, err
}

// checkNew refuses for a new volume what the driver does not support, and more than a volume may have.
func checkNew(request *csi.NodePublishVolumeRequest, a attributes) error {
	mount, mode := request.VolumeCapability.GetMount(), request.VolumeCapability.GetAccessMode().GetMode()
	ephemeral, ok := request.VolumeContext[kubeletKeyPrefix+"ephemeral"]
	switch {
	case mode == csi.VolumeCapability_AccessMode_UNKNOWN:
		return errors.New("volume_capability has no access_mode; the CSI specification requires one, and " +
			"kubelet sends it")
	case mount.FsType != "" && mount.FsType != "tmpfs":
		return fmt.Errorf("fs_type %q: the volume is a tmpfs; leave csi.fsType out of the Pod's volume",
			cut(mount.FsType, maxQuotedBytes))
	case len(mount.MountFlags) > 0:
		return fmt.Errorf("mount_flags %q: mount options are not supported; leave mountOptions out",
			cut(mount.MountFlags[0], maxQuotedBytes))
	case ok && ephemeral != "true":
		return fmt.Errorf("%sephemeral is %q: only inline volumes can be mounted; write csi: into the "+
			"Pod's volumes, not a persistentVolumeClaim", kubeletKeyPrefix, cut(ephemeral, maxQuotedBytes))
	}
	return a.check()
}

// checkTarget makes sure that the target path is one that kubelet makes,
//
//	<pods>/<Pod uid>/volumes/kubernetes.io~csi/<volume>/mount
//
// so that no call can mount or unmount anything elsewhere, and returns the Pod's uid.
func (d *driver) checkTarget(target string) (podUID string, err error) {
	if target == "" {
		return "", failuref(codes.InvalidArgument, "target_path is missing")
	}
	podUID, ok := podOf(d.podsDir, target)
	if !ok {
		return "", failuref(codes.InvalidArgument,
			"target_path %q is not %s/<Pod uid>/volumes/kubernetes.io~csi/<volume>/mount; if kubelet has "+
				"another --root-dir, set --kubelet-dir to it", cut(target, maxQuotedBytes), d.podsDir)
	}
	return podUID, nil
}

// volumeName returns the name of the volume in the Pod, which is part of the target path.
func volumeName(target string) string { return filepath.Base(filepath.Dir(target)) }

// podToken finds the Pod's token for the API server: in the secrets, where Kubernetes 1.35 and later pass it,
// or in volume_context, as older ones do.
func podToken(request *csi.NodePublishVolumeRequest) (token string, _ error) {
	tokens := cmp.Or(request.Secrets[tokensKey], request.VolumeContext[tokensKey])
	ofAPIServer := fields{"": fields{"token": &token}} // by audience
	if !scanFields([]byte(tokens), ofAPIServer) || token == "" {
		return "", failuref(codes.FailedPrecondition,
			"kubelet passed no token of the Pod's ServiceAccount: the CSIDriver object %s must have "+
				"tokenRequests with audience \"\"; apply deploy.yaml again", driverName)
	}
	if len(token) > maxTokenBytes {
		return "", failuref(codes.InvalidArgument, "the token that kubelet passed has more than %d KiB",
			maxTokenBytes>>10)
	}
	return token, nil
}

// checkIdentity compares what kubelet says of the Pod with the claims of its token. The keys are kubelet's
// only while the CSIDriver object has podInfoOnMount; otherwise whoever writes a Pod can write them.
func checkIdentity(pod podIdentity, targetUID string, volumeContext map[string]string) error {
	for _, claim := range [][2]string{{"pod.name", pod.name}, {"pod.namespace", pod.namespace},
		{"pod.uid", pod.uid}, {"serviceAccount.name", pod.serviceAccount}} {
		key := kubeletKeyPrefix + claim[0]
		if said, ok := volumeContext[key]; ok && said != claim[1] {
			return failuref(codes.PermissionDenied, "%s is %q, but the token is that of %q", key,
				cut(said, maxQuotedBytes), claim[1])
		}
	}
	if pod.uid != targetUID {
		return failuref(codes.PermissionDenied,
			"the target path is one of Pod uid %q, but the token is that of %q", targetUID, pod.uid)
	}
	return nil
}

// attributes are the volumeAttributes of a Pod's volume.
type attributes struct {
	connectors []reference
	selection  selection
	lifetime   time.Duration // of the token
	owner      int           // of the files
	mode       os.FileMode   // of the files; 0 if the volume names none
	digest     [sha256.Size]byte
	size       int // in bytes, as the Pod has them
}

// The attributes that a volume may have. An empty value is the same as none.
const (
	attrConnectors     = "connectors"
	attrName           = "connector.name"
	attrNamespace      = "connector.namespace"
	attrConfigurations = "configuration.names"
	attrParams         = "configuration.params"
	attrExpiration     = "token.expiration"
	attrMode           = "file.mode"
	attrOwner          = "file.owner"
)

var knownAttributes = []string{attrConfigurations, attrParams, attrName, attrNamespace, attrConnectors,
	attrExpiration, attrMode, attrOwner}

// parseAttributes reads what stands under volumeAttributes in the Pod. Its errors are for whoever wrote that.
func parseAttributes(volumeContext map[string]string, podNamespace string, builtIn bool) (attributes, error) {
	a := attributes{selection: selection{BuiltIn: builtIn}}
	for key, value := range volumeContext {
		if strings.HasPrefix(key, kubeletKeyPrefix) {
			continue
		}
		if !slices.Contains(knownAttributes, key) {
			return a, fmt.Errorf("unknown attribute %q in volumeAttributes: known are %s",
				cut(key, maxQuotedBytes), strings.Join(knownAttributes, ", "))
		}
		a.size += len(key) + len(value)
	}
	var err error
	if a.connectors, err = parseConnectors(volumeContext, podNamespace); err != nil {
		return a, err
	}
	for _, item := range splitList(volumeContext[attrConfigurations]) {
		if excluded, ok := strings.CutPrefix(item, "!"); ok {
			a.selection.Excluded = append(a.selection.Excluded, strings.TrimSpace(excluded))
		} else {
			a.selection.Configurations = append(a.selection.Configurations, item)
		}
	}
	if len(a.selection.Configurations) == 0 && !builtIn {
		return a, fmt.Errorf("%s is missing in volumeAttributes: name the configurations of the "+
			"ConnectorClass to mount; it may be left out only where the driver runs with --builtin-files",
			attrConfigurations)
	}
	a.selection.Params, err = parseParams(volumeContext[attrParams], a.selection.Configurations)
	if err != nil {
		return a, err
	}
	if a.lifetime, err = parseLifetime(volumeContext[attrExpiration]); err != nil {
		return a, err
	}
	if a.mode, err = parseMode(volumeContext[attrMode]); err != nil {
		return a, err
	}
	a.owner, err = parseOwner(volumeContext[attrOwner])
	return a, err
}

// check refuses for a new volume more than a volume may have.
func (a attributes) check() error {
	if a.size > maxAttributeBytes {
		return fmt.Errorf("volumeAttributes may have %d bytes, not %d: make them smaller, or use several volumes",
			maxAttributeBytes, a.size)
	}
	if len(a.connectors) > maxConnectors {
		return fmt.Errorf("%s may name %d Connectors, not %d: use several volumes",
			attrConnectors, maxConnectors, len(a.connectors))
	}
	for _, names := range [][]string{a.selection.Configurations, a.selection.Excluded} {
		if len(names) > maxConfigurations {
			return fmt.Errorf("%s may have %d configurations and as many exclusions, not %d: use several "+
				"volumes", attrConfigurations, maxConfigurations, len(names))
		}
		seen := map[string]bool{}
		for _, name := range names {
			if len(name) > maxNameBytes {
				return fmt.Errorf("%s: a name may have %d bytes, not %d as %q has",
					attrConfigurations, maxNameBytes, len(name), cut(name, maxQuotedBytes))
			}
			if seen[name] {
				return fmt.Errorf("%s has %q twice: name it once", attrConfigurations,
					cut(name, maxQuotedBytes))
			}
			seen[name] = true
		}
	}
	if a.lifetime > maxTokenLifetime {
		return fmt.Errorf("%s may be at most %v, not %v", attrExpiration, maxTokenLifetime, a.lifetime)
	}
	return nil
}

// parseConnectors returns the Connectors in the order in which a volume names them, in one of two ways.
func parseConnectors(volumeContext map[string]string, podNamespace string) ([]reference, error) {
	list, name, namespace := splitList(volumeContext[attrConnectors]), volumeContext[attrName],
		volumeContext[attrNamespace]
	var references []reference
	switch {
	case len(list) == 0 && name == "":
		return nil, fmt.Errorf("%s or %s is required in volumeAttributes: name the Connector to mount",
			attrConnectors, attrName)
	case len(list) > 0 && (name != "" || namespace != ""):
		return nil, fmt.Errorf("%s cannot be combined with %s and %s: use one way to name the Connectors",
			attrConnectors, attrName, attrNamespace)
	case name != "":
		references = []reference{{cmp.Or(namespace, podNamespace), name}}
	}
	for _, item := range list {
		namespace, name, ok := strings.Cut(item, "/")
		if !ok {
			namespace, name = podNamespace, item
		}
		references = append(references, reference{namespace, name})
	}
	seen := map[reference]bool{}
	for _, r := range references {
		if !isDNSLabel(r.namespace) || !isDNSName(r.name) {
			return nil, fmt.Errorf("%q is not a valid Connector: name and namespace must be DNS names of "+
				"lower-case letters, digits and '-'", r)
		}
		if seen[r] {
			return nil, fmt.Errorf("%s names the Connector %q twice", attrConnectors, r)
		}
		seen[r] = true
	}
	return references, nil
}

// parseParams reads {"<configuration>": {"<parameter>": value, …}, …} and leaves the parameters undecoded.
func parseParams(text string, configurations []string) (map[string]json.RawMessage, error) {
	if text == "" {
		return nil, nil
	}
	var params map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &params); err != nil || params == nil {
		hint := ""
		if syntax := new(json.SyntaxError); errors.As(err, &syntax) { // any other error is in Go's words
			hint = fmt.Sprintf(" (%v at byte %d)", err, syntax.Offset)
		}
		return nil, fmt.Errorf(`%s is not a JSON object such as {"config": {"param": "value"}}%s`, attrParams,
			hint)
	}
	known := map[string]bool{}
	for _, name := range configurations {
		known[name] = true
	}
	for name, value := range params {
		switch {
		case string(value) == "null": // the same as missing
			delete(params, name)
		case !known[name]:
			return nil, fmt.Errorf("%s has parameters for %q, which is not in %s: %s", attrParams,
				cut(name, maxQuotedBytes), attrConfigurations,
				cut(strings.Join(configurations, ", "), maxQuotedBytes))
		case value[0] != '{':
			return nil, fmt.Errorf("%s: the value of %q is not a JSON object", attrParams,
				cut(name, maxQuotedBytes))
		}
	}
	return params, nil
}

// parseLifetime reads the lifetime of the token, in whole seconds.
func parseLifetime(text string) (time.Duration, error) {
	if text == "" {
		return kubeletTokenLifetime, nil
	}
	lifetime, err := time.ParseDuration(text)
	lifetime = lifetime.Truncate(time.Second) // a TokenRequest has whole seconds
	switch {
	case err != nil || lifetime < minTokenLifetime:
		return 0, fmt.Errorf("%s %q is not a duration of at least %v, such as 30m or 1h30m",
			attrExpiration, cut(text, maxQuotedBytes), minTokenLifetime)
	case lifetime == extendedLifetime:
		return 0, fmt.Errorf("%s may not be %v: the API server takes %d seconds as a sign to extend a "+
			"token to a year; use 1h", attrExpiration, lifetime, lifetime/time.Second)
	}
	return lifetime, nil
}

// parseMode reads the mode of files: 0 if there is none.
func parseMode(text string) (os.FileMode, error) {
	if text == "" {
		return 0, nil
	}
	bits, err := strconv.ParseUint(text, 8, 32)
	mode := os.FileMode(bits & 0o666)
	switch {
	case err != nil || len(text) < 3 || len(text) > 4:
		return 0, fmt.Errorf("%s %q is not an octal mode of three or four digits, such as 0600",
			attrMode, cut(text, maxQuotedBytes))
	case mode&0o444 == 0:
		return 0, fmt.Errorf("%s %s lets nobody read the files: use one with a read bit, such as 0600",
			attrMode, text)
	case bits != uint64(mode):
		return 0, fmt.Errorf("%s %s has execute, set-id or sticky bits, which the files never have: use %04o",
			attrMode, text, mode)
	}
	return mode, nil
}

// parseOwner reads the ID of the user who owns the files: root's if there is none.
func parseOwner(text string) (int, error) {
	if text == "" {
		return 0, nil
	}
	uid, err := strconv.ParseUint(text, 10, 31) // as much as a runAsUser may be
	if err != nil || strconv.FormatUint(uid, 10) != text {
		return 0, fmt.Errorf("%s %q is not a user ID: use the number of the user that the container runs as, "+
			"such as 1000", attrOwner, cut(text, maxQuotedBytes))
	}
	return int(uid), nil
}

// splitList returns copies, so that what is kept of the text is no more than its items.
func splitList(text string) []string {
	var items []string
	for item := range strings.SplitSeq(text, ",") {
		if item = strings.TrimSpace(item); item != "" {
			items = append(items, strings.Clone(item))
		}
	}
	return items
}

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)

// isDNSLabel reports whether s can be the name of a namespace.
func isDNSLabel(s string) bool { return len(s) <= 63 && dnsLabel.MatchString(s) }

// isDNSName reports whether s can be the name of an object: labels, here of any length, with dots between
// them.
func isDNSName(s string) bool {
	isNoLabel := func(l string) bool { return !dnsLabel.MatchString(l) }
	return len(s) <= maxNameBytes && !slices.ContainsFunc(strings.Split(s, "."), isNoLabel)
}

// newVolume makes a record. The caller holds the lock, or is newDriver.
func (d *driver) newVolume(target string, memory *footprint) *volume {
	v := &volume{target: target, memory: memory, turn: make(chan struct{}, 1)}
	v.subscriber = subscriber{notify: func() { d.pushSoon(v) }, entries: map[*entry]bool{}}
	d.volumes[target] = v
	return v
}

// takeTurn takes the turn of a target path for a call of kubelet, and makes the record if there is none. It ends
// a push that has the turn, since the call makes that superfluous. While one call waits for the turn or has it,
// another is answered ABORTED, as the CSI specification has it; kubelet comes again half a second later.
func (d *driver) takeTurn(ctx context.Context, target, podUID string) (*volume, error) {
	d.mu.Lock()
	v := d.volumes[target]
	if v == nil {
		v = d.newVolume(target, &footprint{pod: podUID})
	}
	if v.called {
		d.mu.Unlock()
		return nil, failuref(codes.Aborted, "another call for %s is under way; kubelet will try again",
			target)
	}
	v.called = true
	if v.stop != nil {
		v.stop()
	}
	d.mu.Unlock()
	select {
	case v.turn <- struct{}{}:
		return v, nil
	case <-ctx.Done():
	}
	d.mu.Lock()
	v.called = false
	d.mu.Unlock()
	go d.inTurn(v, func(context.Context) {}) // drops the record when whoever has the turn ends
	return nil, ctx.Err()
}

// endTurn gives the turn back, and drops the record of a volume that is not published, unless a call waits.
func (d *driver) endTurn(v *volume) {
	d.mu.Lock()
	if v.stop != nil {
		v.stop = nil
	} else {
		v.called = false
	}
	if !v.published && !v.called && d.volumes[v.target] == v {
		delete(d.volumes, v.target)
	}
	d.mu.Unlock()
	<-v.turn
}

// inTurn runs do in the volume's turn; a call of kubelet that comes meanwhile ends it by ctx.
func (d *driver) inTurn(v *volume, do func(ctx context.Context)) {
	ctx, cancel := context.WithTimeout(context.Background(), publishTimeout)
	defer cancel()
	v.turn <- struct{}{}
	defer d.endTurn(v)
	d.mu.Lock()
	v.stop = cancel
	if v.called || d.closed {
		cancel()
	}
	d.mu.Unlock()
	do(ctx)
}

// pushSoon pushes a volume: at once, or when it is time again. What comes before that push is part of it.
func (d *driver) pushSoon(v *volume) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || !v.due.IsZero() {
		return
	}
	v.due = time.Now()
	v.pushTimer = time.AfterFunc(time.Until(v.pushed.Add(pushInterval<<v.failures)), func() { d.push(v, false) })
}

// push brings the files of a mounted volume up to date as a republish does, with what kubelet's last call said.
// It waits for a call that has the turn, and leaves the work to one that comes meanwhile. A renewal that fails
// is tried again.
func (d *driver) push(v *volume, renewal bool) {
	d.inTurn(v, func(ctx context.Context) {
		d.mu.Lock()
		due := v.due
		if !renewal {
			v.due, v.pushed = time.Time{}, time.Now()
		}
		d.mu.Unlock()
		forgotten := v.publication == nil || !renewal && due.IsZero()
		if at, err := d.budget.look(v.target, v.memory); err == nil && at.complete && !forgotten && ctx.Err() == nil {
			d.pushInTurn(ctx, v, at, renewal, due)
		}
	})
}

// pushInTurn is a push for a change that was due then. The caller has the volume's turn.
func (d *driver) pushInTurn(ctx context.Context, v *volume, at mountState, renewal bool, due time.Time) {
	start, p := time.Now(), v.publication
	changed, err := d.publish(ctx, v, p, at, renewal)
	stopped := errors.Is(ctx.Err(), context.Canceled)
	err = answer(err)
	d.metrics.inc(pushesTotal, "code", status.Code(err).String())
	d.mu.Lock()
	switch {
	case err == nil:
		v.failures = 0
	case renewal:
		v.renewTimer = restart(v.renewTimer, retryInterval, func() { d.push(v, true) })
	case !stopped:
		v.failures = min(v.failures+1, 5)
	}
	d.mu.Unlock()
	if changed && !renewal {
		d.metrics.observe(pushDuration, time.Since(due))
	}
	if changed || err != nil && !stopped {
		d.logPublish("push", p, err, start)
	}
}

// close ends all that goes on beside kubelet's calls:
//
//  1. let no push begin, and stop those under way
//  2. wait for each, and end its volume's timers and streams
//  3. end the renderers
func (d *driver) close() {
	// 1. stop
	d.mu.Lock()
	d.closed = true
	volumes := slices.Collect(maps.Values(d.volumes))
	for _, v := range volumes {
		if v.stop != nil {
			v.stop()
		}
	}
	d.mu.Unlock()

	// 2. wait
	for _, v := range volumes {
		d.inTurn(v, func(context.Context) { d.forget(v) })
	}

	// 3. end
	d.renderers.close()
}

// keep makes p the publication that pushes use. Without room for it, or with nil, there is none: kubelet's calls
// alone refresh the volume, and nothing is watched for it. The caller has the volume's turn.
func (d *driver) keep(v *volume, p *publication) {
	size := 0
	if p != nil {
		size = p.size()
	}
	d.mu.Lock()
	pod := v.memory.pod
	if d.kept[pod]-v.kept+size > maxPodKeptBytes || d.kept[""]-v.kept+size > maxKeptBytes {
		p, size = nil, 0
	}
	d.kept[pod] += size - v.kept
	d.kept[""] += size - v.kept
	v.publication, v.kept = p, size
	if d.kept[pod] == 0 {
		delete(d.kept, pod)
	}
	d.mu.Unlock()
	if p == nil {
		d.kube.unsubscribe(&v.subscriber)
	}
}

// forget drops what the process keeps of a volume: of one that is not mounted any more, or of any at its end.
// The caller has the volume's turn.
func (d *driver) forget(v *volume) {
	v.published = false
	d.keep(v, nil)
	d.budget.forget(v.memory)
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range []*time.Timer{v.pushTimer, v.sweepTimer, v.renewTimer} {
		if t != nil {
			t.Stop()
		}
	}
	v.due = time.Time{}
}

// forgetUnmounted forgets the volumes that somebody else has unmounted, and what nobody keeps any more of others.
func (d *driver) forgetUnmounted() {
	d.budget.checkPinned()
	d.mu.Lock()
	volumes := slices.Collect(maps.Values(d.volumes))
	volumes = slices.DeleteFunc(volumes, func(v *volume) bool { return v.called }) // a call sees for itself
	d.mu.Unlock()
	for _, v := range volumes {
		if at, err := look(v.target); err != nil || at.mounted {
			continue
		}
		d.inTurn(v, func(context.Context) {
			if at, err := look(v.target); err == nil && !at.mounted {
				d.forget(v)
			}
		})
	}
}

// collectSources gets the Connectors of a volume and their classes, each class once.
func collectSources(pod podIdentity, refs []reference, getConnector func(reference) (*apiObject, error),
	getClass func(name string) (*apiObject, error)) ([]source, error) {
	var sources []source
	classes := map[string]*apiObject{}
	for _, ref := range refs {
		connector, err := getConnector(ref)
		if err != nil {
			return nil, connectorError(err, ref, pod)
		}
		name := connector.class
		if !isDNSName(name) {
			return nil, failuref(codes.FailedPrecondition,
				"Connector %q: spec.connectorClassName %q is not the name of a ConnectorClass", ref,
				cut(name, maxQuotedBytes))
		}
		if classes[name] == nil {
			if classes[name], err = getClass(name); err != nil {
				return nil, classError(err, name, ref)
			}
		}
		sources = append(sources, source{connector, classes[name]})
	}
	return sources, nil
}

// proxyAudiences returns the audiences that the proxies of the Connectors want in the token. Whoever may write a
// Connector's status could name any, and have tokens made for somebody else's service; so what a Connector
// names counts only if its class names it too, or if it is its proxy's address, which is where the files send
// the token.
func proxyAudiences(sources []source) ([]string, error) {
	var audiences []string
	for _, s := range sources {
		audience := cmp.Or(s.connector.proxyAudience, s.class.proxyAudience)
		switch {
		case audience == "":
		case audience == s.class.proxyAudience, audience == s.class.classAudience, isProxy(audience, s.connector):
			if !slices.Contains(audiences, audience) {
				audiences = append(audiences, audience)
			}
		default:
			return nil, failuref(codes.FailedPrecondition, "Connector %q: the audience %q in its "+
				"status.proxy.httpAddress is neither one that ConnectorClass %q names "+
				"(status.proxy.httpAddress.audience, spec.proxy.audience) nor the address of the Connector's "+
				"proxy, an http or https URL",
				s.connector.namespace+"/"+s.connector.name, cut(audience, maxQuotedBytes), s.class.name)
		}
	}
	return audiences, nil
}

// isProxy reports whether an audience is the one address of the Connector's proxy, and an http or https URL: a
// plain word is the audience of a service that is no proxy.
func isProxy(audience string, connector *apiObject) bool {
	u, err := url.Parse(audience)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" &&
		audience == connector.proxyURL && audience == cmp.Or(connector.proxyAddress, audience)
}

// chooseToken returns the token for the files: kubelet's, which kubelet renews, or for another lifetime or
// audience one that the driver asks for, and asks for again when 80 % of its lifetime are over.
func (d *driver) chooseToken(ctx context.Context, l *lookup, v *volume, p *publication,
	j job) (string, error) {
	lifetime := p.attributes.lifetime
	extra, err := proxyAudiences(j.sources)
	if err != nil {
		return "", err
	}
	if lifetime == kubeletTokenLifetime && len(extra) == 0 {
		v.token = issuedToken{}
		return p.token, nil
	}
	var audiences []string
	if len(extra) > 0 {
		own, err := audiencesOf(p.token)
		if err != nil {
			return "", failure{codes.InvalidArgument, err}
		}
		audiences = append(own, extra...) // the proxy shows it to the API server
	}
	if t := v.token; time.Now().Before(t.renew) && t.lifetime == lifetime &&
		slices.Equal(t.audiences, audiences) {
		return t.value, nil
	}
	if err := d.renderers.refusal(p.pod.namespace, j.key); err != nil {
		return "", renderError(err)
	}
	token, err := l.requestToken(ctx, audiences, lifetime)
	if err != nil {
		return "", tokenError(err, p)
	}
	v.token = token
	return token.value, nil
}

// connectorError says why a Connector was not read: the object, the cause, the remedy. classError, tokenError,
// renderError and mountError say so of the other things that a publish needs.
func connectorError(err error, ref reference, pod podIdentity) error {
	switch code, err := lookupError(err); code {
	case codes.NotFound:
		return failuref(code,
			"Connector %q not found: create it, or correct %s or %s in volumeAttributes (%v)",
			ref, attrName, attrNamespace, err)
	case codes.PermissionDenied:
		return failuref(code, "ServiceAccount %[1]s/%[2]s may not read Connector %[3]q: %[4]v. Allow "+
			"it with: kubectl create rolebinding %[1]s.%[2]s-connectors --namespace=%[5]s "+
			"--clusterrole=connectors-connector-viewer-role --serviceaccount=%[1]s:%[2]s",
			pod.namespace, pod.serviceAccount, ref, err, ref.namespace)
	default:
		return failuref(code, "Connector %q cannot be read: %v", ref, err)
	}
}

func classError(err error, name string, ref reference) error {
	switch code, err := lookupError(err); code {
	case codes.NotFound:
		return failuref(code, "ConnectorClass %q of Connector %q not found: create it, or correct the "+
			"Connector's spec.connectorClassName (%v)", name, ref, err)
	case codes.PermissionDenied:
		return failuref(code, "the driver may not read ConnectorClass %q: %v. Its ClusterRole "+
			"connectors-csi is missing; apply deploy.yaml again", name, err)
	default:
		return failuref(code, "ConnectorClass %q of Connector %q cannot be read: %v", name, ref, err)
	}
}

func tokenError(err error, p *publication) error {
	code, err := lookupError(err)
	if code != codes.PermissionDenied {
		return failuref(code, "no token of %v for ServiceAccount %s/%s: %v", p.attributes.lifetime,
			p.pod.namespace, p.pod.serviceAccount, err)
	}
	remedy := fmt.Sprintf(". A token.expiration other than %v, or a proxy with an audience, needs the ClusterRole "+
		"connectors-csi-token and its binding; apply them from deploy.yaml, or leave token.expiration out",
		kubeletTokenLifetime)
	if strings.Contains(err.Error(), "ValidatingAdmissionPolicy") { // it gives a reason of its own
		remedy = ""
	}
	return failuref(code, "the driver may not request a token for ServiceAccount %s/%s: %v%s",
		p.pod.namespace, p.pod.serviceAccount, err, remedy)
}

func renderError(err error) error {
	switch code := codeOf(err); code {
	case codes.Canceled, codes.DeadlineExceeded:
		return failuref(code, "rendering took too long: %v", err)
	default:
		return failure{cmp.Or(code, codes.FailedPrecondition), err}
	}
}

func mountError(err error) error {
	switch {
	case codeOf(err) != codes.OK:
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
		return failuref(codes.ResourceExhausted,
			"no room for the volume's files: %v; look at the node's memory and the driver's limit", err)
	case errors.Is(err, errNotOurs):
		return failuref(codes.FailedPrecondition,
			"%v; look at it on the node, and remove it if nothing uses it", err)
	}
	return failuref(codes.Internal,
		"the node's kernel refused the volume: %v; look at the driver's log and at dmesg on the node", err)
}

// answer makes the error that kubelet hears, short enough for an event.
func answer(err error) error {
	if err == nil {
		return nil
	}
	return status.Error(cmp.Or(codeOf(err), codes.Internal), cut(err.Error(), maxMessageBytes))
}

// logCall writes the one line of a call that failed or changed something.
func (d *driver) logCall(call string, err error, pairs ...any) {
	for i, a := range pairs {
		if text, ok := a.(string); ok {
			pairs[i] = cut(text, maxQuotedBytes)
		}
	}
	if err != nil {
		d.log.Error(call, append(pairs, "code", status.Code(err).String(),
			"error", status.Convert(err).Message())...)
	} else {
		d.log.Info(call, pairs...)
	}
}
