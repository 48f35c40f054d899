package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// serviceAccountDir is where kubelet mounts the token and the CA of the driver's own ServiceAccount.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

const (
	connectorsAPI = "/apis/connectors.alauda.io/v1alpha1"

	requestTimeout = 15 * time.Second

	// Requests under way: for the Pods of one namespace; with Pods' tokens, in all; and with the driver's
	// own.
	maxRequests          = 16
	maxNamespaceRequests = 4
	maxOwnRequests       = 16

	// etcd holds objects of at most about 1.5 MiB, which JSON can make longer.
	maxObjectBytes = 3 << 20
	// The objects of a volume together, those of the volumes under way for the Pods of one namespace, and in
	// all.
	maxVolumeObjectsBytes    = 4 << 20
	maxNamespaceObjectsBytes = 6 << 20
	maxObjectsBytes          = 16 << 20
	// maxCacheBytes is what the cache keeps; what was used longest ago leaves first.
	maxCacheBytes = 4 << 20

	maxTokenBytes = 16 << 10

	// Streams at once: in all, and of those that the Pods of one namespace need. What is beyond is polled.
	maxStreams          = 256
	maxNamespaceStreams = 64

	// How long a stream may last, from the smaller to the larger, so that those of a node do not end
	// together.
	minStreamTime, maxStreamTime = 25 * time.Minute, 30 * time.Minute
	// How long to wait before a stream that was lost is opened again, at most; and one that was refused once,
	// and more than once, at least.
	maxReopenTime    = 30 * time.Second
	firstRefusedTime = 5 * time.Second
	refusedTime      = 4 * time.Minute

	maxEventBytes = 4 << 10 // that are looked into
	// What is read of a stream at once. Each has this buffer all its life, an event for a moment.
	eventBufferBytes = 512

	noVersion      = ""  // of no object
	unknownVersion = "?" // of an object of which no more is known
)

// kube reads from the Kubernetes API, for all volumes of the node.
type kube struct {
	server  string // https://host:port
	client  *http.Client
	watcher *http.Client  // for streams
	refresh time.Duration // how old an object that is not watched may be for a refresh
	metrics *metrics
	changed chan string // target paths of volumes of which an object has changed

	places    chan struct{} // holds an element for each request under way with a Pod's token
	ownPlaces chan struct{} // and for each with the driver's own

	mu         sync.Mutex
	namespaces map[string]*share // of those with calls under way
	held       *holdings
	cache      map[string]*cached
	cacheBytes int
	tidied     time.Time
	reads      map[cacheKey]*reading // under way
	streams    map[cacheKey]*stream
}

// share is what the calls for the Pods of one namespace take at this moment.
type share struct {
	calls  int
	held   *holdings
	places chan struct{} // holds an element for each request under way
}

// apiError is an answer of the API server that is not a success: the essence of its Status object.
type apiError struct {
	code    int // HTTP status
	message string
}

func (e *apiError) Error() string {
	return fmt.Sprintf("%s (HTTP %d from the API server)", e.message, e.code)
}

// newKube connects to the API server that Kubernetes names to every Pod. Proxy settings of the environment
// are ignored: no Pod's token shall go to one.
func newKube(refresh time.Duration, m *metrics) (*kube, error) {
	host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the " +
			"driver runs in a Pod only")
	}
	pem, err := os.ReadFile(filepath.Join(serviceAccountDir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("no ServiceAccount: %w; the Pod needs serviceAccountName and "+
			"automountServiceAccountToken", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s/ca.crt", serviceAccountDir)
	}
	if _, err := ownToken(); err != nil {
		return nil, err
	}
	transport := &http.Transport{
		TLSClientConfig:     &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:   true,
		MaxIdleConnsPerHost: maxRequests,
		DisableCompression:  true, // what limits an answer's size counts what comes over the network
		IdleConnTimeout:     5 * time.Minute,
		TLSHandshakeTimeout: requestTimeout,
		// Finds out that a connection is dead, which TCP alone may take a quarter of an hour for.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second},
	}
	streaming := transport.Clone()
	streaming.ResponseHeaderTimeout = requestTimeout
	streaming.HTTP2.MaxReceiveBufferPerStream = 64 << 10
	noRedirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &kube{
		server:     "https://" + net.JoinHostPort(host, port),
		client:     &http.Client{Transport: transport, Timeout: requestTimeout, CheckRedirect: noRedirect},
		watcher:    &http.Client{Transport: streaming, CheckRedirect: noRedirect},
		refresh:    refresh,
		metrics:    m,
		changed:    make(chan string),
		places:     make(chan struct{}, maxRequests),
		ownPlaces:  make(chan struct{}, maxOwnRequests),
		namespaces: map[string]*share{},
		held:       newHoldings(),
		cache:      map[string]*cached{},
		reads:      map[cacheKey]*reading{},
		streams:    map[cacheKey]*stream{},
	}, nil
}

// ownToken is the token of the driver's ServiceAccount. Kubelet replaces the file before the token expires.
func ownToken() (string, error) {
	token, err := os.ReadFile(filepath.Join(serviceAccountDir, "token"))
	if err != nil {
		return "", fmt.Errorf("no ServiceAccount token: %w", err)
	}
	return strings.TrimSpace(string(token)), nil
}

// call is one publish or push, as far as the API server and the memory of its objects are concerned.
type call struct {
	kube     *kube
	pod      podIdentity
	token    string // the Pod's
	first    bool   // nothing counts that was read before the call; Connectors are read with this very token
	began    time.Time
	versions map[cacheKey]string // of the objects that the call asked for; noVersion if it did not get one

	share   *share
	objects []*apiObject
	size    int // of objects, in bytes
	limit   int // of size
}

// begin begins a call for the Pod. The caller ends it. A volume that is mounted goes on when it is larger
// than a new one may be, and takes from the cache what is current.
func (k *kube) begin(pod podIdentity, token string, mounted bool) *call {
	limit := maxVolumeObjectsBytes
	if mounted {
		limit = maxNamespaceObjectsBytes
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.namespaces[pod.namespace]
	if s == nil {
		s = &share{places: make(chan struct{}, maxNamespaceRequests), held: newHoldings()}
		k.namespaces[pod.namespace] = s
	}
	s.calls++
	return &call{kube: k, pod: pod, token: token, first: !mounted, began: time.Now(),
		versions: map[cacheKey]string{}, share: s, limit: limit}
}

// end lets go of the objects that the call holds.
func (c *call) end() {
	k := c.kube
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range c.objects {
		k.held.remove(o)
		c.share.held.remove(o)
	}
	if c.share.calls--; c.share.calls == 0 {
		delete(k.namespaces, c.pod.namespace)
	}
}

// holdings are the objects that calls under way hold, each of which counts once, since the calls share it.
type holdings struct {
	bytes int
	calls map[*apiObject]int // how many hold it
}

func newHoldings() *holdings { return &holdings{calls: map[*apiObject]int{}} }

// with is the size in bytes with one more object.
func (h *holdings) with(o *apiObject) int {
	if h.calls[o] > 0 {
		return h.bytes
	}
	return h.bytes + len(o.raw)
}

func (h *holdings) add(o *apiObject) {
	h.bytes = h.with(o)
	h.calls[o]++
}

func (h *holdings) remove(o *apiObject) {
	if h.calls[o]--; h.calls[o] == 0 {
		h.bytes -= len(o.raw)
		delete(h.calls, o)
	}
}

// objectError is returned for an object that is refused as it is, roomError where there is no room for one at
// this moment.
type (
	objectError struct{ error }
	roomError   struct{ error }
)

var errObjectSize = objectError{fmt.Errorf("it has more than %d KiB", maxObjectBytes>>10)}

// hold counts an object that the call keeps until its end.
func (c *call) hold(o *apiObject) error {
	k, size := c.kube, len(o.raw)
	if size > maxObjectBytes {
		return errObjectSize
	}
	if c.size+size > c.limit {
		return objectError{fmt.Errorf("it has %d KiB, with which the Connectors and ConnectorClasses of "+
			"the volume have more than %d KiB together",
			size>>10, c.limit>>10)}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	namespace, all := c.share.held.with(o), k.held.with(o)
	if namespace > maxNamespaceObjectsBytes || all > maxObjectsBytes {
		return roomError{fmt.Errorf("the volumes that are being published would hold objects of %d KiB "+
			"with it, and those of namespace %q of %d KiB; there is room for %d and %d KiB", all>>10,
			c.pod.namespace, namespace>>10, maxObjectsBytes>>10, maxNamespaceObjectsBytes>>10)}
	}
	c.objects = append(c.objects, o)
	c.size += size
	k.held.add(o)
	c.share.held.add(o)
	return nil
}

// reference names a Connector.
type reference struct{ namespace, name string }

// String is for messages and the log.
func (r reference) String() string { return cut(r.namespace+"/"+r.name, maxQuotedBytes) }

// connector reads a Connector with the token of the Pod that mounts it, so that the API server decides
// whether the Pod's ServiceAccount may.
func (c *call) connector(ctx context.Context, ref reference) (o *apiObject, err error) {
	key := cacheKey{
		path:   connectorsAPI + "/namespaces/" + ref.namespace + "/connectors/" + ref.name,
		reader: c.pod.namespace + "/" + c.pod.serviceAccount,
	}
	read := func(ctx context.Context) (*apiObject, error) {
		return c.kube.getObject(ctx, []chan struct{}{c.share.places, c.kube.places}, "connectors", key.path,
			c.token)
	}
	if c.first {
		o, err = c.kube.readAndKeep(ctx, key, read)
	} else {
		o, err = c.kube.get(ctx, c, key, read)
	}
	c.note(key, o)
	return o, err
}

// class reads a ConnectorClass with the driver's own token.
func (c *call) class(ctx context.Context, name string) (*apiObject, error) {
	key := cacheKey{path: connectorsAPI + "/connectorclasses/" + name}
	o, err := c.kube.get(ctx, c, key, func(ctx context.Context) (*apiObject, error) {
		token, err := ownToken()
		if err != nil {
			return nil, err
		}
		return c.kube.getObject(ctx, []chan struct{}{c.share.places, c.kube.ownPlaces}, "connectorclasses",
			key.path, token)
	})
	c.note(key, o)
	return o, err
}

// note remembers what the call was given for the key, if anything.
func (c *call) note(key cacheKey, o *apiObject) {
	c.versions[key] = noVersion
	if o != nil {
		c.versions[key] = o.version
	}
}

// getObject reads one object; see do for the places.
func (k *kube) getObject(ctx context.Context, places []chan struct{}, resource, path,
	token string) (*apiObject, error) {
	data, err := k.do(ctx, places, resource, path, token, nil)
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxObjectBytes:
		return nil, errObjectSize
	}
	return parseObject(data)
}

// issuedToken is a token that the driver asked for, and what it asked for.
type issuedToken struct {
	value     string
	renew     time.Time // when 80 % of its lifetime are over, as kubelet does it
	lifetime  time.Duration
	audiences []string
}

// requestToken asks for a token of the Pod's ServiceAccount that ends with the Pod: the API server refuses it
// when the Pod's uid is another. When to renew it is counted from the request, by the monotonic clock: the
// node's time of day may be another than the API server's.
func (k *kube) requestToken(ctx context.Context, c *call, pod podIdentity, audiences []string,
	lifetime time.Duration) (issuedToken, error) {
	seconds := int64(lifetime / time.Second)
	spec := map[string]any{
		"expirationSeconds": seconds,
		"boundObjectRef": map[string]any{"apiVersion": "v1", "kind": "Pod", "name": pod.name,
			"uid": pod.uid},
	}
	if len(audiences) > 0 {
		spec["audiences"] = audiences
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": spec})
	if err != nil {
		return issuedToken{}, err
	}
	own, err := ownToken()
	if err != nil {
		return issuedToken{}, err
	}
	asked := time.Now()
	path := "/api/v1/namespaces/" + url.PathEscape(pod.namespace) + "/serviceaccounts/" +
		url.PathEscape(pod.serviceAccount) + "/token"
	data, err := k.do(ctx, []chan struct{}{c.share.places, k.ownPlaces}, "serviceaccounts/token", path, own,
		body)
	if err != nil {
		return issuedToken{}, err
	}
	var answer struct {
		Spec   struct{ ExpirationSeconds int64 }
		Status struct{ Token string }
	}
	if json.Unmarshal(data, &answer) != nil || answer.Status.Token == "" ||
		len(answer.Status.Token) > maxTokenBytes {
		return issuedToken{}, &apiError{http.StatusBadGateway,
			"the answer to the TokenRequest has no token, or a huge one"}
	}
	if granted := answer.Spec.ExpirationSeconds; granted > 0 {
		seconds = min(seconds, granted) // the API server may have a limit of its own
	}
	renew := asked.Add(time.Duration(seconds) * time.Second * 8 / 10)
	return issuedToken{answer.Status.Token, renew, lifetime, audiences}, nil
}

// apiObject is an object as the API server sent it, with the few fields that the driver itself needs. It is
// never decoded here: a small text can take fifty times its size then. Nobody may change it, since volumes
// share it.
type apiObject struct {
	raw             []byte
	namespace, name string
	version         string // of its contents: metadata.uid and metadata.resourceVersion
	class           string // of a Connector: spec.connectorClassName
	proxyAddress    string // status.proxyAddress
	proxyURL        string // status.proxy.httpAddress.url
	proxyAudience   string // status.proxy.httpAddress.audience
	classAudience   string // of a class: spec.proxy.audience
}

// parseObject reads the fields of an object.
func parseObject(raw []byte) (*apiObject, error) {
	var uid, resourceVersion string
	o := &apiObject{raw: raw}
	wanted := fields{
		"metadata": fields{"namespace": &o.namespace, "name": &o.name, "uid": &uid,
			"resourceVersion": &resourceVersion},
		"spec": fields{"connectorClassName": &o.class, "proxy": fields{"audience": &o.classAudience}},
		"status": fields{
			"proxyAddress": &o.proxyAddress,
			"proxy":        fields{"httpAddress": fields{"url": &o.proxyURL, "audience": &o.proxyAudience}},
		},
	}
	if !scanFields(raw, wanted) {
		return nil, &apiError{http.StatusBadGateway, "the answer is not a Kubernetes object"}
	}
	o.version = contentVersion(uid, resourceVersion)
	return o, nil
}

// contentVersion names the contents of an object: resourceVersion changes with every change, and the uid with
// another object of the same name.
func contentVersion(uid, resourceVersion string) string { return uid + "@" + resourceVersion }

// fields are the wanted ones of a JSON object by name: a *string for a string, fields for an object.
type fields map[string]any

// scanFields stores what is wanted of a JSON text, if it is an object. Unlike encoding/json it takes no
// memory, whatever the text, and names count to the letter, as they do in templates: encoding/json would take
// "URL" for "url".
func scanFields(text []byte, wanted fields) (isObject bool) {
	if !json.Valid(text) || text[skipSpace(text, 0)] != '{' {
		return false
	}
	scanValue(text, 0, wanted)
	return true
}

// scanValue goes over one value of a valid JSON text, from i on, stores what is wanted of it, and returns
// where it ends.
func scanValue(text []byte, i int, wanted any) (end int) {
	i = skipSpace(text, i)
	switch text[i] {
	case '"':
		end := endOfString(text, i)
		if field, ok := wanted.(*string); ok {
			*field = unquote(text[i:end])
		}
		return end
	case '{', '[':
		inObject, _ := wanted.(fields)
		isObject := text[i] == '{'
		for i = skipSpace(text, i+1); text[i] != '}' && text[i] != ']'; {
			var inner any
			if isObject {
				end := endOfString(text, i)
				if inObject != nil {
					inner = inObject[unquote(text[i:end])]
				}
				i = skipSpace(text, end) + len(":")
			}
			if i = skipSpace(text, scanValue(text, i, inner)); text[i] == ',' {
				i = skipSpace(text, i+1)
			}
		}
		return i + 1
	}
	// a number, true, false or null
	for i < len(text) && !bytes.ContainsRune([]byte(" \t\r\n,]}"), rune(text[i])) {
		i++
	}
	return i
}

func skipSpace(text []byte, i int) int {
	for i < len(text) && (text[i] == ' ' || text[i] == '\t' || text[i] == '\r' || text[i] == '\n') {
		i++
	}
	return i
}

// endOfString returns what follows the string that begins at i.
func endOfString(text []byte, i int) int {
	for i++; text[i] != '"'; i++ {
		if text[i] == '\\' {
			i++
		}
	}
	return i + 1
}

// unquote decodes a string. One without a backslash is what stands between its quotes.
func unquote(quoted []byte) (text string) {
	if !bytes.Contains(quoted, []byte("\\")) {
		return string(quoted[1 : len(quoted)-1])
	}
	json.Unmarshal(quoted, &text) // it is valid
	return text
}

// cacheKey names an object and who reads it: what one ServiceAccount may see, another may not.
type cacheKey struct {
	path   string
	reader string // namespace/name of a ServiceAccount, or empty for the driver
}

// cached is an object of the cache, once for all who read it.
type cached struct {
	object  *apiObject
	began   time.Time            // when the read began that gave it
	used    time.Time            // when it was asked for last
	readers map[string]time.Time // when the API server last let each reader have just this object
}

// reading is a read under way, which everyone waits for who needs the object.
type reading struct {
	began  time.Time
	done   chan struct{}
	object *apiObject
	err    error
	failed bool // the one who reads has given up, or his token is refused: which says nothing to others
}

// get returns an object that is current, or reads it:
//
//  1. the cache serves what is current
//  2. a read that is under way for the same reader is waited for, if what it returns will be current
//  3. or else this call reads, for all who wait
func (k *kube) get(ctx context.Context, c *call, key cacheKey,
	read func(context.Context) (*apiObject, error)) (*apiObject, error) {
	for {
		// 1. cached
		k.mu.Lock()
		if e := k.cache[key.path]; e != nil && k.isCurrent(c, key, e.object.version, e.readers[key.reader]) {
			e.used = time.Now()
			o := e.object // which another read may replace from now on
			k.mu.Unlock()
			return o, nil
		}

		// 2. under way
		if r := k.reads[key]; r != nil && k.isCurrent(c, key, unknownVersion, r.began) {
			k.mu.Unlock()
			select {
			case <-r.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if !r.failed {
				return r.object, r.err
			}
			continue
		}

		// 3. read
		r := &reading{began: time.Now(), done: make(chan struct{})}
		k.reads[key] = r
		k.mu.Unlock()
		r.object, r.err = k.readAndKeep(ctx, key, read)
		r.failed = r.err != nil && (ctx.Err() != nil || isStatus(r.err, http.StatusUnauthorized))
		k.mu.Lock()
		if k.reads[key] == r { // and not a later one
			delete(k.reads, key)
		}
		k.mu.Unlock()
		close(r.done)
		return r.object, r.err
	}
}

// isCurrent reports whether an object is new enough for a call, if the API server let its reader have this
// version at a certain time (zero: never). So it is
//
//   - for any call, if that was after the call began
//   - except for a first publish, while the object's stream is open and has either named this version last or
//     said nothing else since
//   - for as long as the refresh interval, counted from the end of such a stream, or where there was none
//     from that time
//
// The caller holds the lock.
func (k *kube) isCurrent(c *call, key cacheKey, version string, at time.Time) bool {
	s := k.streams[key]
	switch {
	case at.IsZero():
		return false
	case at.After(c.began):
		return true
	case c.first:
		return false
	case s == nil || s.heard.IsZero():
		return time.Since(at) < k.refresh
	case !s.said(version) && !at.After(s.heard):
		return false
	}
	return s.open || time.Since(at) < k.refresh || time.Since(s.ended) < k.refresh
}

// readAndKeep reads an object and keeps it in the cache. Of two reads the one counts that began later,
// whichever ends first: what is returned may be newer than what was read, and is never older than what was
// returned before.
func (k *kube) readAndKeep(ctx context.Context, key cacheKey,
	read func(context.Context) (*apiObject, error)) (*apiObject, error) {
	began := time.Now()
	o, err := read(ctx)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tidy()
	c := k.cache[key.path]
	switch {
	case c == nil:
		c = &cached{object: o, began: began, readers: map[string]time.Time{}}
		k.cache[key.path] = c
		k.cacheBytes += len(o.raw)
	case began.After(c.began):
		c.began = began
		if c.object.version != o.version {
			k.cacheBytes += len(o.raw) - len(c.object.raw)
			c.object = o
			clear(c.readers) // whether the others may have this one is for the API server to say
		}
	}
	if c.used = time.Now(); began.After(c.readers[key.reader]) {
		c.readers[key.reader] = began
	}
	o = c.object
	k.evict()
	return o, nil
}

// tidy drops, once a minute, what is not watched and no volume has asked for in a long time, so that the
// cache follows the volumes of the node. The caller holds the lock.
func (k *kube) tidy() {
	if time.Since(k.tidied) < time.Minute {
		return
	}
	k.tidied = time.Now()
	for path, c := range k.cache {
		maps.DeleteFunc(c.readers, func(reader string, at time.Time) bool {
			return k.streams[cacheKey{path, reader}] == nil && time.Since(at) > 3*k.refresh+5*time.Minute
		})
		if len(c.readers) == 0 {
			k.drop(path)
		}
	}
}

// evict keeps the cache within its limit. The caller holds the lock.
func (k *kube) evict() {
	for k.cacheBytes > maxCacheBytes {
		oldest := ""
		for path, c := range k.cache {
			if oldest == "" || c.used.Before(k.cache[oldest].used) {
				oldest = path
			}
		}
		k.drop(oldest)
	}
}

// drop removes an object from the cache. The caller holds the lock.
func (k *kube) drop(path string) {
	k.cacheBytes -= len(k.cache[path].object.raw)
	delete(k.cache, path)
}

// stream is a watch of one object for one reader, for as long as a volume uses the object. It says that the
// object has changed; what it is then is read, so that the API server decides at every change whether the
// reader may have it.
type stream struct {
	key       cacheKey
	namespace string         // of the Pod that it was opened for
	users     map[string]use // by target path
	renewed   chan struct{}  // has an element when a user has brought another token
	stop      context.CancelFunc

	open   bool
	ended  time.Time // when it was open last, if it is not
	heard  time.Time // when its last event came
	latest string    // the version that its last event named
	resume string    // the resourceVersion from which to go on; follow's own
}

// use is what a volume has to do with a stream.
type use struct {
	made    string    // the version that its files were made from
	token   string    // of its Pod, for a Connector
	brought time.Time // when kubelet brought the token
	refused bool      // the API server does not accept the token
}

// said reports whether the last event named this version.
func (s *stream) said(version string) bool { return version == s.latest && version != unknownVersion }

// watch has the objects watched that the call asked for, for the volume at the target path. It reports
// whether one of them changed after the call began, which the volume was not told.
func (c *call) watch(target string) (missed bool) {
	k := c.kube
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, version := range c.versions {
		s := k.streams[key]
		if s == nil {
			if s = k.newStream(key, c.pod.namespace); s == nil {
				continue // it is polled
			}
		}
		u := s.users[target]
		if version != noVersion {
			u.made = version
		}
		if key.reader != "" && u.token != c.token { // the driver's own comes from its file
			u.token, u.brought, u.refused = c.token, time.Now(), false
			if len(s.users) > 0 { // a new stream begins with it
				select {
				case s.renewed <- struct{}{}:
				default:
				}
			}
		}
		s.users[target] = u
		missed = missed || s.open && s.heard.After(c.began) && !s.said(u.made)
	}
	return missed
}

// unwatch has nothing watched any more for the volume but the objects of these versions.
func (k *kube) unwatch(target string, versions map[cacheKey]string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, s := range k.streams {
		_, uses := s.users[target]
		if _, keeps := versions[key]; !uses || keeps {
			continue
		}
		if delete(s.users, target); len(s.users) == 0 {
			delete(k.streams, key)
			s.stop()
		}
	}
}

// newStream begins a stream for a Pod of the namespace, unless there are too many. The caller holds the lock.
func (k *kube) newStream(key cacheKey, namespace string) *stream {
	others := 0
	for _, s := range k.streams {
		if s.namespace == namespace {
			others++
		}
	}
	if others >= maxNamespaceStreams || len(k.streams) >= maxStreams {
		return nil
	}
	ctx, stop := context.WithCancel(context.Background())
	s := &stream{key: key, namespace: namespace, users: map[string]use{}, renewed: make(chan struct{}, 1),
		stop: stop}
	k.streams[key] = s
	go k.follow(ctx, s)
	return s
}

// close ends all streams.
func (k *kube) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, s := range k.streams {
		delete(k.streams, key)
		s.stop()
	}
}

// follow keeps a stream open until it is stopped:
//
//  1. open it, from where it ended before if it did, and take its events
//  2. if the API server has forgotten what happened since then (410), or does not take it (400), begin with
//     what there is now
//  3. if a token was refused (401), as that of a deleted Pod is, use another Pod's
//  4. wait: if the ServiceAccount may not watch the object (403), for another token or some minutes, but
//     after the first refusal some seconds, since an API server that has just started refuses what it allows
//     later; otherwise a random time, since many streams end together, which grows while this one fails
func (k *kube) follow(ctx context.Context, s *stream) {
	failures, refusals, told := 0, 0, false
	for ctx.Err() == nil {
		// 1. open
		select {
		case <-s.renewed: // it is among those to choose from
		default:
		}
		began, from, token := time.Now(), s.resume, k.newestToken(s)
		atLeast, err := k.takeEvents(ctx, s, token)
		k.ended(s)

		// 2. forgotten
		if (isStatus(err, http.StatusGone) || isStatus(err, http.StatusBadRequest)) && s.resume != "" {
			forgotten := s.resume == from
			if s.resume = ""; forgotten {
				continue
			}
		}

		// 3. another token
		forbidden, unauthorized := isStatus(err, http.StatusForbidden), isStatus(err, http.StatusUnauthorized)
		if unauthorized && k.refuse(s, token) {
			continue
		}

		// 4. wait
		if failures = min(failures+1, 5); time.Since(began) > maxReopenTime {
			failures = 0
		}
		wait, renewed := max(atLeast, rand.N(min(time.Second<<failures, maxReopenTime))), (chan struct{})(nil)
		switch {
		case !forbidden && !unauthorized:
			refusals = 0
		case refusals == 0:
			refusals, wait, renewed = 1, firstRefusedTime+rand.N(2*firstRefusedTime), s.renewed
		default:
			refusals, wait, renewed = 2, refusedTime+rand.N(refusedTime), s.renewed
		}
		if forbidden && refusals > 1 && !told {
			told = true
			slog.Warn("an object is polled, since it may not be watched: grant the verb watch beside get",
				"object", s.key.path, "reader", cmp.Or(s.key.reader, driverName), "error", err)
		}
		select {
		case <-time.After(wait):
		case <-renewed:
		case <-ctx.Done():
		}
	}
}

// newestToken returns the token that kubelet has brought last of those that were not refused, or of all if
// all were.
func (k *kube) newestToken(s *stream) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var newest use
	for _, u := range s.users {
		if newest.token == "" || newest.refused && !u.refused ||
			newest.refused == u.refused && u.brought.After(newest.brought) {
			newest = u
		}
	}
	return newest.token
}

// refuse marks a token that the API server has refused, and reports whether there is another.
func (k *kube) refuse(s *stream, token string) (another bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for target, u := range s.users {
		u.refused = u.refused || u.token == token
		s.users[target] = u
		another = another || !u.refused
	}
	return another && s.key.reader != ""
}

// takeEvents opens a stream once and takes its events until it ends. It returns how long the API server wants
// not to be asked again, and why the stream ended, unless it did so in the usual way.
func (k *kube) takeEvents(ctx context.Context, s *stream, token string) (atLeast time.Duration, _ error) {
	ctx, cancel := context.WithTimeout(ctx, maxStreamTime+time.Minute)
	defer cancel()
	response, atLeast, err := k.openStream(ctx, s, token)
	if err != nil {
		return atLeast, err
	}
	defer response.Body.Close()
	if s.resume != "" {
		k.hear(ctx, s, s.latest, s.heard) // nothing is missing
	}
	events := bufio.NewReaderSize(response.Body, eventBufferBytes)
	for {
		line, err := readEvent(events)
		switch {
		case errors.Is(err, io.EOF):
			return 0, nil
		case err != nil:
			return 0, err
		case len(line) > maxEventBytes: // whatever it is, something has changed
			s.resume = ""
			k.hear(ctx, s, unknownVersion, time.Now())
		default:
			if err := k.takeEvent(ctx, s, line); err != nil {
				return 0, err
			}
		}
	}
}

// readEvent returns the next line of a stream, or of one that has more than maxEventBytes its beginning.
func readEvent(events *bufio.Reader) (line []byte, err error) {
	for {
		part, err := events.ReadSlice('\n')
		if len(line) <= maxEventBytes {
			line = append(line, part...)
		}
		if err != bufio.ErrBufferFull {
			return line, err
		}
	}
}

// openStream asks for the metadata of one object and its changes. Without a resourceVersion the stream begins
// with the object as it is. That of a read would not do: the API server may have forgotten it, and will not
// know it better later.
func (k *kube) openStream(ctx context.Context, s *stream,
	token string) (_ *http.Response, atLeast time.Duration, err error) {
	resource, name := path.Split(s.key.path)
	lifetime := minStreamTime + rand.N(maxStreamTime-minStreamTime)
	query := url.Values{
		"watch": {"1"}, "allowWatchBookmarks": {"true"}, "fieldSelector": {"metadata.name=" + name},
		"timeoutSeconds": {strconv.Itoa(int(lifetime.Seconds()))},
	}
	if s.resume != "" {
		query.Set("resourceVersion", s.resume)
	}
	if s.key.reader == "" {
		if token, err = ownToken(); err != nil {
			return nil, 0, err
		}
	}
	target := k.server + strings.TrimSuffix(resource, "/") + "?" + query.Encode()
	request, err := k.newRequest(ctx, target, token, nil)
	if err != nil {
		return nil, 0, err
	}
	request.Header.Set("Accept", "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1")
	response, err := k.watcher.Do(request)
	k.count(path.Base(resource), "watch", response)
	if err != nil || response.StatusCode == http.StatusOK {
		return response, 0, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxObjectBytes))
	if err != nil {
		return nil, 0, err
	}
	atLeast, err = decodeFailure(response, data)
	return nil, atLeast, err
}

// takeEvent takes one event of a stream:
// https://kubernetes.io/docs/reference/using-api/api-concepts/#watch-bookmarks
func (k *kube) takeEvent(ctx context.Context, s *stream, line []byte) error {
	var event struct {
		Type   string
		Object struct {
			Metadata struct{ UID, ResourceVersion string }
			Code     int // of a Status, as Message is
			Message  string
		}
	}
	if err := json.Unmarshal(line, &event); err != nil {
		return &apiError{http.StatusBadGateway, "the stream has something else than events"}
	}
	about := event.Object.Metadata
	switch event.Type {
	case "ADDED", "MODIFIED":
		s.resume = about.ResourceVersion
		k.hear(ctx, s, contentVersion(about.UID, about.ResourceVersion), time.Now())
	case "DELETED":
		s.resume = about.ResourceVersion
		k.hear(ctx, s, noVersion, time.Now())
	case "BOOKMARK":
		if !s.open { // a new stream begins with the object, if there is one
			k.hear(ctx, s, noVersion, time.Now())
		}
		s.resume = about.ResourceVersion
	case "ERROR":
		return &apiError{event.Object.Code, event.Object.Message}
	default:
		return &apiError{http.StatusBadGateway, "the stream has events of an unknown type"}
	}
	return nil
}

// hear takes what a stream says, which makes it an open one, and tells the volumes that are made from another
// version.
func (k *kube) hear(ctx context.Context, s *stream, version string, at time.Time) {
	k.mu.Lock()
	if !s.open {
		s.open = true
		k.metrics.add(watchesOpen, 1)
	}
	s.heard, s.latest = at, version
	var targets []string
	for target, u := range s.users {
		if !s.said(u.made) {
			targets = append(targets, target)
		}
	}
	k.mu.Unlock()
	for _, target := range targets {
		select {
		case k.changed <- target:
		case <-ctx.Done():
			return
		}
	}
}

// ended is called when a stream has ended, or never came about.
func (k *kube) ended(s *stream) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if s.open {
		s.open, s.ended = false, time.Now()
		k.metrics.add(watchesOpen, -1)
	}
}

// do sends one request and returns what the API server answers with. It takes a place in each of the channels
// for it. It waits as the API server asks (429 and 503 with Retry-After) and tries again, for as long as ctx
// allows.
func (k *kube) do(ctx context.Context, places []chan struct{}, resource, path, token string,
	body []byte) ([]byte, error) {
	for {
		answer, wait, err := k.once(ctx, places, resource, path, token, body)
		if wait == 0 {
			return answer, err
		}
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
			return nil, err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// once sends one request. A wait above zero means that the API server wants to be asked again after it.
func (k *kube) once(ctx context.Context, places []chan struct{}, resource, path, token string,
	body []byte) (_ []byte, wait time.Duration, _ error) {
	for _, p := range places {
		select {
		case p <- struct{}{}:
			defer func() { <-p }()
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
	request, err := k.newRequest(ctx, k.server+path, token, body)
	if err != nil {
		return nil, 0, err
	}
	verb := "get"
	if body != nil {
		verb = "create"
	}
	response, err := k.client.Do(request)
	k.count(resource, verb, response)
	if err != nil {
		return nil, 0, err
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxObjectBytes+1))
	if err != nil || response.StatusCode/100 == 2 {
		return data, 0, err
	}
	wait, err = decodeFailure(response, data)
	return nil, wait, err
}

// newRequest makes a GET, or with a body a POST.
func (k *kube) newRequest(ctx context.Context, target, token string, body []byte) (*http.Request, error) {
	method := http.MethodGet
	if body != nil {
		method = http.MethodPost
	}
	request, err := http.NewRequestWithContext(ctx, method, target, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "connectors-csi/"+version)
	return request, nil
}

// count counts a request by what the API server has answered, if it has.
func (k *kube) count(resource, verb string, response *http.Response) {
	code := "none"
	if response != nil {
		code = strconv.Itoa(response.StatusCode)
	}
	k.metrics.inc(apiRequestsTotal, "resource", resource, "verb", verb, "code", code)
}

// isStatus reports whether the error is the API server's answer with this HTTP status.
func isStatus(err error, code int) bool {
	var answer *apiError
	return errors.As(err, &answer) && answer.code == code
}

// decodeFailure takes the error and the time to wait out of an answer. One that is not Kubernetes' own is
// never quoted.
func decodeFailure(response *http.Response, data []byte) (wait time.Duration, _ error) {
	var answer struct{ Kind, Message string }
	if json.Unmarshal(data, &answer) != nil || answer.Kind != "Status" || answer.Message == "" {
		answer.Message = http.StatusText(response.StatusCode)
	}
	if response.StatusCode == http.StatusTooManyRequests ||
		response.StatusCode == http.StatusServiceUnavailable {
		if seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 16); err == nil {
			wait = time.Duration(max(seconds, 1)) * time.Second
		}
	}
	return wait, &apiError{response.StatusCode, answer.Message}
}
