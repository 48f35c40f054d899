package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
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

	maxMessageBytes = 1000 // an event holds 1,024
	maxQuotedBytes  = 200  // of any one thing that a user wrote, in a message or a log line
	maxKeyBytes     = 63   // of a quoted key

	// What the volumeAttributes of a new volume may hold.
	maxAttributeBytes = 32 << 10 // keys and values together
	maxConnectors     = 32
	maxConfigurations = 64  // and as many exclusions
	maxNameBytes      = 253 // as Kubernetes has it for names of objects

	maxUnmountedTokens = 256 // that are kept for volumes which are not mounted yet

	// pushInterval is the least time between two pushes of a volume. It doubles while they fail, to 32 times
	// as much.
	pushInterval = time.Second

	kubeletKeyPrefix = "csi.storage.k8s.io/" // keys of volume_context and secrets that are kubelet's
	tokensKey        = kubeletKeyPrefix + "serviceAccount.tokens"
)

// driver serves the Identity and Node services of the Container Storage Interface, version 1. RPCs that it
// does not implement answer Unimplemented.
type driver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer

	nodeName     string
	podsDir      string // kubelet's; every target path is below it
	builtInFiles bool
	kube         *kube
	renderers    *renderers
	budget       *budget
	metrics      *metrics

	mu      sync.Mutex
	busy    map[string]*holder     // by target path
	volumes map[string]*volume     // by target path; those that are mounted
	tokens  map[string]issuedToken // that the driver asked for, by target path
}

// volume is what the process remembers of a mounted volume. After a restart it remembers none, until kubelet
// calls.
type volume struct {
	publication *publication // the last that was valid, which pushes use

	// For whoever has locked the target path.
	digest [sha256.Size]byte // of all that the files were made from
	swept  bool              // no generation is left but that of these files

	due      time.Time // when the change came that the next push is for; zero if none is to come
	pushed   time.Time // when the last push began
	failures int       // of the last pushes
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

// NodeGetCapabilities announces VOLUME_MOUNT_GROUP, with which kubelet passes the Pod's fsGroup: it applies
// none itself to a read-only volume.
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
//  2. lock the target path; refuse to a new volume what a mounted one goes on with
//  3. read the Connectors and their classes, and have a token
//  4. have a renderer make the files, in memory, unless they were made from just this before
//  5. mount them, or update the mount in place
//
// Until step 5 nothing is touched: a first publish that fails leaves nothing behind, since kubelet sends no
// Unpublish after a final error, and a republish that fails leaves the last good files.
func (d *driver) NodePublishVolume(ctx context.Context,
	request *csi.NodePublishVolumeRequest) (_ *csi.NodePublishVolumeResponse, err error) {
	start, changed := time.Now(), false
	ctx, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	var p *publication
	defer func() {
		err = errorStatus(err)
		d.metrics.inc(publishTotal, "code", status.Code(err).String())
		d.metrics.observe(publishDuration, time.Since(start))
		if changed || err != nil {
			p.log("publish", err, start)
		}
	}()

	// 1. validate
	if p, err = d.validate(request); err != nil {
		return nil, err
	}

	// 2. lock
	unlock, err := d.lock(ctx, p.target)
	if err != nil {
		return nil, err
	}
	defer unlock()
	mounted := isPublished(p.target)
	if !mounted {
		if err := checkNew(request, p.attributes); err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
	}
	p.attributes.lifetime = min(p.attributes.lifetime, maxTokenLifetime)

	// 3. to 5.
	if changed, err = d.publish(ctx, p, mounted); err != nil {
		return nil, err
	}
	return &csi.NodePublishVolumeResponse{}, nil
}

// publish is what a call of kubelet and a push have in common: the steps 3 to 5 of NodePublishVolume. The
// caller has locked the target path.
func (d *driver) publish(ctx context.Context, p *publication, mounted bool) (changed bool, err error) {
	// 3. read
	var known *volume
	if mounted {
		known = d.renew(p)
	}
	c := d.kube.begin(p.pod, p.token, mounted)
	defer c.end()
	defer d.watch(c, p.target)
	class := func(name string) (*apiObject, error) { return c.class(ctx, name) }
	connector := func(ref reference) (*apiObject, error) { return c.connector(ctx, ref) }
	sources, err := collectSources(c, p.pod, p.attributes.connectors, connector, class)
	if err != nil {
		return false, err
	}
	token, err := d.chooseToken(ctx, c, p, sources)
	if err != nil {
		return false, err
	}

	// 4. render
	made := digestOf(p, sources, token)
	if known != nil && known.digest == made {
		return false, d.sweep(p.target, known)
	}
	f, err := d.renderers.render(ctx, p.pod.namespace, job{sources, p.attributes.selection, token})
	if err != nil {
		d.metrics.inc(templateFailuresTotal)
		return false, renderStatus(err)
	}

	// 5. mount or update
	if changed, err = d.budget.publish(p.target, f, p.who); err != nil {
		return changed, mountStatus(err)
	}
	d.remember(p, made, !changed)
	d.kube.unwatch(p.target, c.versions)
	return changed, nil
}

// sweep removes, once, the generation that an update has left to those who were following ..data into it.
func (d *driver) sweep(target string, v *volume) error {
	if v.swept {
		return nil
	}
	if err := d.budget.sweep(target); err != nil {
		return mountStatus(err)
	}
	v.swept = true
	return nil
}

// digestOf identifies all that the files of a volume are made from. Texts are quoted, so that no two
// different things give the same; the token, which is long, comes as its own digest.
func digestOf(p *publication, sources []source, token string) (digest [sha256.Size]byte) {
	h, want := sha256.New(), p.attributes.selection
	fmt.Fprintf(h, "%v %q %q %q %t %x", p.who, want.configurations, want.excluded, want.params, want.builtIn,
		sha256.Sum256([]byte(token)))
	for _, s := range sources {
		fmt.Fprintf(h, " %q %q", s.connector.version, s.class.version)
	}
	h.Sum(digest[:0])
	return digest
}

// NodeUnpublishVolume unmounts a volume and removes its target path. It needs no memory of the volume and no
// API server, and succeeds where there is nothing to do.
func (d *driver) NodeUnpublishVolume(ctx context.Context,
	request *csi.NodeUnpublishVolumeRequest) (_ *csi.NodeUnpublishVolumeResponse, err error) {
	start, changed, pod := time.Now(), false, ""
	defer func() {
		err = errorStatus(err)
		d.metrics.inc(unpublishTotal, "code", status.Code(err).String())
		if changed || err != nil {
			logCall("unpublish", err, "pod", pod, "volume", volumeName(request.TargetPath),
				"duration", time.Since(start))
		}
	}()
	if request.VolumeId == "" {
		return nil, status.Error(codes.InvalidArgument, "volume_id is missing")
	}
	if pod, err = d.checkTarget(request.TargetPath); err != nil {
		return nil, err
	}
	unlock, err := d.lock(ctx, request.TargetPath)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if v := d.recall(request.TargetPath); v != nil { // otherwise its uid is all that is known of the Pod
		pod = v.publication.pod.namespace + "/" + v.publication.pod.name
	}
	if changed, err = d.budget.unpublish(request.TargetPath); err != nil {
		return nil, mountStatus(err)
	}
	d.forget(request.TargetPath)
	return &csi.NodeUnpublishVolumeResponse{}, nil
}

// publication is a validated request to publish. It is kept as long as the volume, so it holds nothing more
// of the request than is needed.
type publication struct {
	target     string
	pod        podIdentity
	token      string // the Pod's, from kubelet
	attributes attributes
	who        access
}

func (p *publication) log(call string, err error, start time.Time) {
	logCall(call, err, "pod", p.pod.namespace+"/"+p.pod.name, "volume", volumeName(p.target),
		"connectors", fmt.Sprint(p.attributes.connectors), "duration", time.Since(start))
}

// validate checks all that can be checked without reading anything. With an error it returns as much as is
// known of the Pod.
func (d *driver) validate(request *csi.NodePublishVolumeRequest) (*publication, error) {
	p := &publication{target: request.TargetPath}
	// Until the token's claims are known, for the log only.
	p.pod.namespace, p.pod.name = request.VolumeContext[kubeletKeyPrefix+"pod.namespace"],
		request.VolumeContext[kubeletKeyPrefix+"pod.name"]
	fail := func(format string, a ...any) (*publication, error) {
		return p, status.Errorf(codes.InvalidArgument, format, a...)
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
		p.who = access{gid: int(gid), hasGroup: true}
	}
	if p.token, err = podToken(request); err != nil {
		return p, err
	}
	pod, err := parseIdentity(p.token)
	if err != nil {
		return fail("%v", err)
	}
	p.pod = pod
	if err := checkIdentity(p.pod, uid, request.VolumeContext); err != nil {
		return p, err
	}
	p.attributes, err = parseAttributes(request.VolumeContext, p.pod.namespace, d.builtInFiles)
	if err != nil {
		return fail("%v", err)
	}
	return p, nil
}

// checkNew refuses for a new volume what would be ignored without a word, and too many bytes of attributes.
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
	sum, largest, size := 0, "", 0
	for key, value := range request.VolumeContext {
		if strings.HasPrefix(key, kubeletKeyPrefix) {
			continue
		}
		bytes := len(key) + len(value)
		if sum += bytes; bytes > size {
			largest, size = key, bytes
		}
	}
	if sum > maxAttributeBytes {
		return fmt.Errorf("volumeAttributes may have %d bytes, not %d; the largest is %q with %d: make it "+
			"smaller, or use several volumes", maxAttributeBytes, sum, largest, size)
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
		return "", status.Error(codes.InvalidArgument, "target_path is missing")
	}
	below, ok := strings.CutPrefix(target, d.podsDir+"/")
	parts := strings.Split(below, "/")
	if !ok || filepath.Clean(target) != target || len(parts) != 5 ||
		parts[1] != "volumes" || parts[2] != "kubernetes.io~csi" || parts[4] != "mount" {
		return "", status.Errorf(codes.InvalidArgument,
			"target_path %q is not %s/<Pod uid>/volumes/kubernetes.io~csi/<volume>/mount; if kubelet has "+
				"another --root-dir, set --kubelet-dir to it", cut(target, maxQuotedBytes), d.podsDir)
	}
	return parts[0], nil
}

// volumeName is the name of the volume in the Pod, which is part of the target path.
func volumeName(target string) string { return filepath.Base(filepath.Dir(target)) }

// podToken finds the Pod's token for the API server: in the secrets, where Kubernetes 1.35 and later pass it,
// or in volume_context, as older ones do.
func podToken(request *csi.NodePublishVolumeRequest) (token string, _ error) {
	tokens := cmp.Or(request.Secrets[tokensKey], request.VolumeContext[tokensKey])
	ofAPIServer := fields{"": fields{"token": &token}} // by audience
	if !scanFields([]byte(tokens), ofAPIServer) || token == "" {
		return "", status.Errorf(codes.FailedPrecondition,
			"kubelet passed no token of the Pod's ServiceAccount: the CSIDriver object %s must have "+
				"tokenRequests with audience \"\"; apply deploy.yaml again", driverName)
	}
	if len(token) > maxTokenBytes {
		return "", status.Errorf(codes.InvalidArgument, "the token that kubelet passed has more than %d KiB",
			maxTokenBytes>>10)
	}
	return token, nil
}

// podIdentity is whom a Pod's token belongs to.
type podIdentity struct{ namespace, serviceAccount, name, uid string }

var errMalformedToken = errors.New("the token that kubelet passed is not one of a Pod's ServiceAccount")

// parseIdentity reads the claims of a Pod's token without checking its signature: that is the API server's,
// which accepts the token, or not, before anything comes of the claims.
func parseIdentity(token string) (pod podIdentity, _ error) {
	isObject := scanFields(claimsOf(token), fields{"kubernetes.io": fields{
		"namespace":      &pod.namespace,
		"serviceaccount": fields{"name": &pod.serviceAccount},
		"pod":            fields{"name": &pod.name, "uid": &pod.uid},
	}})
	if !isObject || pod.namespace == "" || pod.serviceAccount == "" || pod.name == "" || pod.uid == "" {
		return podIdentity{}, errMalformedToken
	}
	return pod, nil
}

// claimsOf returns the payload of a token, or nil.
func claimsOf(token string) []byte {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil
	}
	return claims
}

// audiencesOf returns the audiences of a token, which are one string or a list (RFC 7519, section 4.1.3).
func audiencesOf(token string) (audiences []string, _ error) {
	var claims struct {
		Audience json.RawMessage `json:"aud"`
	}
	if err := json.Unmarshal(claimsOf(token), &claims); err != nil {
		return nil, errMalformedToken
	}
	if err := json.Unmarshal(claims.Audience, &audiences); err != nil {
		audiences = make([]string, 1)
		if err := json.Unmarshal(claims.Audience, &audiences[0]); err != nil {
			return nil, errMalformedToken
		}
	}
	return audiences, nil
}

// checkIdentity compares what kubelet says of the Pod with the claims of its token. The keys are kubelet's
// only while the CSIDriver object has podInfoOnMount; otherwise whoever writes a Pod can write them.
func checkIdentity(pod podIdentity, targetUID string, volumeContext map[string]string) error {
	claims := map[string]string{
		"pod.name": pod.name, "pod.namespace": pod.namespace, "pod.uid": pod.uid,
		"serviceAccount.name": pod.serviceAccount,
	}
	for key, claim := range claims {
		if said, ok := volumeContext[kubeletKeyPrefix+key]; ok && said != claim {
			return status.Errorf(codes.PermissionDenied, "%s%s is %q, but the token is that of %q",
				kubeletKeyPrefix, key, cut(said, maxQuotedBytes), claim)
		}
	}
	if pod.uid != targetUID {
		return status.Errorf(codes.PermissionDenied,
			"the target path is one of Pod uid %q, but the token is that of %q", targetUID, pod.uid)
	}
	return nil
}

// attributes are the volumeAttributes of a Pod's volume.
type attributes struct {
	connectors []reference
	selection  selection
	lifetime   time.Duration // of the token
}

// The attributes that a volume may have. An empty value is the same as none.
const (
	attrConnectors     = "connectors"
	attrName           = "connector.name"
	attrNamespace      = "connector.namespace"
	attrConfigurations = "configuration.names"
	attrParams         = "configuration.params"
	attrExpiration     = "token.expiration"
)

var knownAttributes = []string{attrConfigurations, attrParams, attrName, attrNamespace, attrConnectors,
	attrExpiration}

// parseAttributes reads what stands under volumeAttributes in the Pod. Its errors are for whoever wrote that.
func parseAttributes(volumeContext map[string]string, podNamespace string, builtIn bool) (attributes, error) {
	a := attributes{selection: selection{builtIn: builtIn}}
	for key := range volumeContext {
		if !slices.Contains(knownAttributes, key) && !strings.HasPrefix(key, kubeletKeyPrefix) {
			key = cut(key, maxKeyBytes) // the search for the nearest takes time in proportion to it
			return a, fmt.Errorf("unknown attribute %q in volumeAttributes: did you mean %q? Known are: %s",
				key, nearest(key, knownAttributes), strings.Join(knownAttributes, ", "))
		}
	}
	var err error
	if a.connectors, err = parseConnectors(volumeContext, podNamespace); err != nil {
		return a, err
	}
	for _, item := range splitList(volumeContext[attrConfigurations]) {
		if excluded, ok := strings.CutPrefix(item, "!"); ok {
			a.selection.excluded = append(a.selection.excluded, strings.TrimSpace(excluded))
		} else {
			a.selection.configurations = append(a.selection.configurations, item)
		}
	}
	if len(a.selection.configurations) == 0 && !builtIn {
		return a, fmt.Errorf("%s is missing in volumeAttributes: name the configurations of the "+
			"ConnectorClass to mount", attrConfigurations)
	}
	a.selection.params, err = parseParams(volumeContext[attrParams], a.selection.configurations)
	if err != nil {
		return a, err
	}
	a.lifetime, err = parseLifetime(volumeContext[attrExpiration])
	return a, err
}

// check refuses for a new volume more than a volume may have.
func (a attributes) check() error {
	if len(a.connectors) > maxConnectors {
		return fmt.Errorf("%s may name %d Connectors, not %d: use several volumes",
			attrConnectors, maxConnectors, len(a.connectors))
	}
	for _, names := range [][]string{a.selection.configurations, a.selection.excluded} {
		if len(names) > maxConfigurations {
			return fmt.Errorf("%s may have %d configurations and as many exclusions, not %d: use several "+
				"volumes",
				attrConfigurations, maxConfigurations, len(names))
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

// parseConnectors returns the Connectors that a volume names in one of two ways, each once and in that order.
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
			"token to a year; use 1h",
			attrExpiration, lifetime, lifetime/time.Second)
	}
	return lifetime, nil
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

// holder is a call of kubelet or a push that has locked a target path.
type holder struct {
	stop func()        // ends a push; nil for a call
	done chan struct{} // closed at the end
}

// lock locks the target path for a call of kubelet. A push that has it is ended: the call does the same. A
// second call is told to come again, as the CSI specification has it (ABORTED: an operation is pending for
// the volume): kubelet does, half a second later.
func (d *driver) lock(ctx context.Context, target string) (unlock func(), err error) {
	for {
		other := d.take(target, &holder{done: make(chan struct{})})
		switch {
		case other == nil:
			return func() { d.release(target) }, nil
		case other.stop == nil:
			return nil, status.Errorf(codes.Aborted,
				"another call for %s is under way; kubelet will try again", target)
		}
		other.stop()
		select {
		case <-other.done:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// take gives the target path to the holder, or returns the one that has it.
func (d *driver) take(target string, h *holder) (other *holder) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if other := d.busy[target]; other != nil {
		return other
	}
	d.busy[target] = h
	return nil
}

// release lets go of the target path, and wakes those who wait for it.
func (d *driver) release(target string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.busy[target].done)
	delete(d.busy, target)
}

// pushChanges has the volumes pushed of which an object has changed, until ctx ends.
func (d *driver) pushChanges(ctx context.Context) {
	for {
		select {
		case target := <-d.kube.changed:
			d.pushSoon(target)
		case <-ctx.Done():
			return
		}
	}
}

// pushSoon has a volume pushed: at once, or when it is time again. What comes before that push is part of it.
func (d *driver) pushSoon(target string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[target]
	if v == nil || !v.due.IsZero() {
		return
	}
	v.due = time.Now()
	time.AfterFunc(time.Until(v.pushed.Add(pushInterval<<v.failures)), func() { d.push(target) })
}

// push brings the files of a mounted volume up to date as a republish does, with what kubelet's last call
// said. It waits for a call that is under way, and ends when one comes.
func (d *driver) push(target string) {
	ctx, cancel := context.WithTimeout(context.Background(), publishTimeout)
	defer cancel()
	h := &holder{stop: cancel, done: make(chan struct{})}
	for other := d.take(target, h); other != nil; other = d.take(target, h) {
		<-other.done
	}
	defer d.release(target)
	p, due := d.beginPush(target)
	if p == nil || !isPublished(target) {
		return
	}
	start := time.Now()
	changed, err := d.publish(ctx, p, true)
	err = errorStatus(err)
	d.endPush(target, err != nil)
	d.metrics.inc(pushesTotal, "code", status.Code(err).String())
	if changed && err == nil {
		d.metrics.observe(pushDuration, time.Since(due))
	}
	if stopped := errors.Is(ctx.Err(), context.Canceled); changed || err != nil && !stopped {
		p.log("push", err, start)
	}
}

// beginPush returns what a push is made from, and when the change came. It returns nil for a volume that is
// gone.
func (d *driver) beginPush(target string) (p *publication, due time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[target]
	if v == nil {
		return nil, time.Time{}
	}
	due, v.due, v.pushed = v.due, time.Time{}, time.Now()
	return v.publication, due
}

// endPush counts the pushes that failed since the volume was published.
func (d *driver) endPush(target string, failed bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if v := d.volumes[target]; v != nil && failed {
		v.failures = min(v.failures+1, 5)
	}
}

// close ends pushes and streams, and the renderers.
func (d *driver) close() {
	d.mu.Lock()
	clear(d.volumes)
	holders := slices.Collect(maps.Values(d.busy))
	d.mu.Unlock()
	for _, h := range holders {
		if h.stop != nil {
			h.stop()
		}
		<-h.done
	}
	d.kube.close() // after the pushes, which may have begun streams
	d.renderers.close()
}

// recall returns what this process remembers of a volume, or nil.
func (d *driver) recall(target string) *volume {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.volumes[target]
}

// renew returns what is remembered of the volume, or nil, and remembers what kubelet says of it now: also
// when the call fails later on, its token is the newest.
func (d *driver) renew(p *publication) *volume {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[p.target]
	if v != nil {
		v.publication = p
	}
	return v
}

// remember keeps what a volume was published from, as its digest, and whether no old files are left in it.
func (d *driver) remember(p *publication, made [sha256.Size]byte, swept bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v := d.volumes[p.target]
	if v == nil {
		v = &volume{}
		d.volumes[p.target] = v
	}
	v.publication, v.digest, v.swept, v.failures = p, made, swept, 0
}

// watch has the objects that a call asked for watched, if the volume is mounted.
func (d *driver) watch(c *call, target string) {
	if d.recall(target) == nil {
		return
	}
	if c.watch(target) {
		d.pushSoon(target)
	}
}

// forget drops all that is kept of a volume.
func (d *driver) forget(target string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.volumes, target)
	delete(d.tokens, target)
	d.kube.unwatch(target, nil)
}

// forgetUnmounted forgets the volumes that somebody else has unmounted.
func (d *driver) forgetUnmounted() {
	d.budget.forgetUnmounted()
	d.mu.Lock()
	targets := slices.Collect(maps.Keys(d.volumes))
	d.mu.Unlock()
	for _, target := range targets {
		if isPublished(target) {
			continue
		}
		if unlock, err := d.lock(context.Background(), target); err == nil {
			if !isPublished(target) {
				d.forget(target)
			}
			unlock()
		}
	}
}

// keepToken keeps a token for the volume's next calls, also for the next try where this one fails. Kubelet
// sends no unpublish for a volume that was never mounted: so when there are too many of these, their tokens
// go, and whoever tries again makes the driver ask for another one.
func (d *driver) keepToken(target string, token issuedToken) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.tokens) >= len(d.volumes)+maxUnmountedTokens {
		maps.DeleteFunc(d.tokens, func(target string, _ issuedToken) bool { return d.volumes[target] == nil })
	}
	d.tokens[target] = token
}

// keptToken returns what keepToken has kept for the volume, if anything.
func (d *driver) keptToken(target string) issuedToken {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tokens[target]
}

// collectSources gets the Connectors of a volume and their classes, each class once, and counts what the call
// holds.
func collectSources(c *call, pod podIdentity, refs []reference,
	getConnector func(reference) (*apiObject, error),
	getClass func(name string) (*apiObject, error)) ([]source, error) {
	var sources []source
	classes := map[string]*apiObject{}
	for _, ref := range refs {
		connector, err := getConnector(ref)
		if err == nil {
			err = c.hold(connector)
		}
		if err != nil {
			return nil, connectorStatus(err, ref, pod)
		}
		name := connector.class
		if !isDNSName(name) {
			return nil, status.Errorf(codes.FailedPrecondition,
				"Connector %q: spec.connectorClassName %q is not the name of a ConnectorClass", ref,
				cut(name, maxQuotedBytes))
		}
		if classes[name] == nil {
			class, err := getClass(name)
			if err == nil {
				err = c.hold(class)
			}
			if err != nil {
				return nil, classStatus(err, name, ref)
			}
			classes[name] = class
		}
		sources = append(sources, source{connector, classes[name]})
	}
	return sources, nil
}

// proxyAudiences are the audiences that the proxies of the Connectors want in the token. Whoever may write a
// Connector's status could name any, and have tokens made for somebody else's service; so what a Connector
// names counts only if its class names it too, or if it is the proxy's address, which is where the files send
// the token.
func proxyAudiences(sources []source) ([]string, error) {
	var audiences []string
	for _, s := range sources {
		connector, class := s.connector, s.class
		audience := cmp.Or(connector.proxyAudience, class.proxyAudience)
		isProxy := audience == connector.proxyURL &&
			(connector.proxyAddress == "" || connector.proxyAddress == connector.proxyURL)
		if audience != "" && audience != class.proxyAudience && audience != class.classAudience && !isProxy {
			return nil, status.Errorf(codes.FailedPrecondition,
				"Connector %q: the audience %q in its status.proxy.httpAddress is neither one that "+
					"ConnectorClass %q names (status.proxy.httpAddress.audience, spec.proxy.audience) nor "+
					"the address of the Connector's proxy",
				connector.namespace+"/"+connector.name, cut(audience, maxQuotedBytes), class.name)
		}
		if audience != "" && !slices.Contains(audiences, audience) {
			audiences = append(audiences, audience)
		}
	}
	return audiences, nil
}

// chooseToken returns the token for the files: kubelet's, which kubelet renews, or for another lifetime or
// audience one that the driver asks for, and asks for again when 80 % of its lifetime are over.
func (d *driver) chooseToken(ctx context.Context, c *call, p *publication, sources []source) (string, error) {
	lifetime := p.attributes.lifetime
	extra, err := proxyAudiences(sources)
	if err != nil {
		return "", err
	}
	if lifetime == kubeletTokenLifetime && len(extra) == 0 {
		return p.token, nil
	}
	var audiences []string
	if len(extra) > 0 {
		own, err := audiencesOf(p.token)
		if err != nil {
			return "", status.Error(codes.InvalidArgument, err.Error())
		}
		audiences = append(own, extra...) // the proxy shows it to the API server
	}
	token := d.keptToken(p.target)
	if time.Now().Before(token.renew) && token.lifetime == lifetime &&
		slices.Equal(token.audiences, audiences) {
		return token.value, nil
	}
	token, err = d.kube.requestToken(ctx, c, p.pod, audiences, lifetime)
	if err != nil {
		return "", tokenStatus(err, p)
	}
	d.keepToken(p.target, token)
	return token.value, nil
}

// connectorStatus says why a Connector was not read: the object, the cause, the remedy. The functions after
// it do the same for the other things that a publish needs.
func connectorStatus(err error, ref reference, pod podIdentity) error {
	switch code, err := apiStatus(err); code {
	case codes.NotFound:
		return status.Errorf(code,
			"Connector %q not found: create it, or correct %s or %s in volumeAttributes (%v)",
			ref, attrName, attrNamespace, err)
	case codes.PermissionDenied:
		return status.Errorf(code, "ServiceAccount %s/%s may not read Connector %q: %v. Allow it with: "+
			"kubectl create rolebinding %s-connectors --namespace=%s "+
			"--clusterrole=connectors-connector-viewer-role --serviceaccount=%s:%s",
			pod.namespace, pod.serviceAccount, ref, err, pod.serviceAccount, ref.namespace, pod.namespace,
			pod.serviceAccount)
	default:
		return status.Errorf(code, "Connector %q cannot be read: %v", ref, err)
	}
}

func classStatus(err error, name string, ref reference) error {
	switch code, err := apiStatus(err); code {
	case codes.NotFound:
		return status.Errorf(code, "ConnectorClass %q of Connector %q not found: create it, or correct the "+
			"Connector's spec.connectorClassName (%v)", name, ref, err)
	case codes.PermissionDenied:
		return status.Errorf(code, "the driver may not read ConnectorClass %q: %v. Its ClusterRole "+
			"connectors-csi is missing; apply deploy.yaml again", name, err)
	default:
		return status.Errorf(code, "ConnectorClass %q of Connector %q cannot be read: %v", name, ref, err)
	}
}

func tokenStatus(err error, p *publication) error {
	switch code, err := apiStatus(err); code {
	case codes.PermissionDenied:
		return status.Errorf(code, "the driver may not request a token for ServiceAccount %s/%s: %v. A "+
			"token.expiration other than %v, or a proxy with an audience, needs the ClusterRole "+
			"connectors-csi-token and its binding; apply them from deploy.yaml, or leave "+
			"token.expiration out",
			p.pod.namespace, p.pod.serviceAccount, err, kubeletTokenLifetime)
	default:
		return status.Errorf(code, "no token of %v for ServiceAccount %s/%s: %v", p.attributes.lifetime,
			p.pod.namespace, p.pod.serviceAccount, err)
	}
}

// apiStatus gives the gRPC code for an error of a request to the API server. For kubelet Unavailable,
// ResourceExhausted, DeadlineExceeded, Canceled and Aborted mean "perhaps mounted": it sends an Unpublish
// when the Pod goes. All others mean "not mounted".
func apiStatus(err error) (codes.Code, error) {
	var answer *apiError
	switch {
	case errors.As(err, new(objectError)):
		return codes.FailedPrecondition, err
	case errors.As(err, new(roomError)):
		return codes.ResourceExhausted, err
	case !errors.As(err, &answer):
		return cmp.Or(contextCode(err), codes.Unavailable),
			fmt.Errorf("no answer from the API server: %w", err)
	}
	switch answer.code {
	case http.StatusBadRequest, http.StatusUnprocessableEntity:
		return codes.InvalidArgument, err
	case http.StatusUnauthorized:
		return codes.Unauthenticated, err
	case http.StatusForbidden:
		return codes.PermissionDenied, err
	case http.StatusNotFound:
		return codes.NotFound, err
	case http.StatusConflict:
		return codes.Aborted, err
	case http.StatusTooManyRequests:
		return codes.ResourceExhausted, err
	}
	return codes.Unavailable, err
}

// contextCode is the code for a call that was ended or ran out of time, or OK for any other error.
func contextCode(err error) codes.Code {
	switch {
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.OK
}

func renderStatus(err error) error {
	code := codes.FailedPrecondition
	switch {
	case contextCode(err) != codes.OK:
		return status.Errorf(contextCode(err), "rendering took too long: %v", err)
	case errors.As(err, new(podError)):
		code = codes.InvalidArgument
	case errors.As(err, new(accountError)):
		code = codes.ResourceExhausted
	case errors.As(err, new(rendererError)):
		code = codes.Unavailable
	}
	return status.Error(code, err.Error())
}

func mountStatus(err error) error {
	switch {
	case errors.As(err, new(limitError)):
		return status.Error(codes.ResourceExhausted, err.Error())
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.ENOMEM):
		return status.Errorf(codes.ResourceExhausted,
			"no room for the volume's files: %v; look at the node's memory and the driver's limit", err)
	case errors.Is(err, errNotOurs):
		return status.Errorf(codes.FailedPrecondition,
			"%v; look at it on the node, and remove it if nothing uses it", err)
	}
	return status.Errorf(codes.Internal,
		"the node's kernel refused the volume: %v; look at the driver's log and at dmesg on the node", err)
}

// errorStatus keeps a message within what an event can hold.
func errorStatus(err error) error {
	s, _ := status.FromError(err)
	if len(s.Message()) <= maxMessageBytes {
		return err
	}
	return status.Error(s.Code(), cut(s.Message(), maxMessageBytes))
}

// cut shortens a text to so many bytes of valid UTF-8, since parts of it may come from anybody.
func cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + " …"
}

// logCall writes the one line of a call that failed or changed something.
func logCall(call string, err error, attributes ...any) {
	for i, a := range attributes {
		if text, ok := a.(string); ok {
			attributes[i] = cut(text, maxQuotedBytes)
		}
	}
	if err != nil {
		slog.Error(call, append(attributes, "code", status.Code(err).String(),
			"error", status.Convert(err).Message())...)
	} else {
		slog.Info(call, attributes...)
	}
}

// nearest returns the word with the fewest insertions, deletions and substitutions (Levenshtein distance).
func nearest(word string, words []string) string {
	distance := func(other string) int {
		row := make([]int, len(other)+1)
		for j := range row {
			row[j] = j
		}
		for i := range len(word) {
			diagonal := row[0]
			row[0] = i + 1
			for j := range len(other) {
				cost := diagonal
				if word[i] != other[j] {
					cost++
				}
				diagonal = row[j+1]
				row[j+1] = min(cost, row[j]+1, row[j+1]+1)
			}
		}
		return row[len(other)]
	}
	return slices.MinFunc(words, func(a, b string) int { return cmp.Compare(distance(a), distance(b)) })
}
