package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
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

	// Requests under way: for the Pods of one namespace; with Pods' tokens, in all; and with the driver's own.
	maxRequests          = 16
	maxNamespaceRequests = 4
	maxOwnRequests       = 16

	// etcd holds objects of at most about 1.5 MiB, which JSON can make longer.
	maxObjectBytes = 3 << 20
	// The objects of a volume together, those of the volumes under way for the Pods of one namespace, and in all.
	maxVolumeObjectsBytes    = 4 << 20
	maxNamespaceObjectsBytes = 6 << 20
	maxObjectsBytes          = 16 << 20
	// maxCacheBytes is what the cache keeps; what was used longest ago leaves first.
	maxCacheBytes = 4 << 20

	maxTokenBytes = 16 << 10
)

// kube reads from the Kubernetes API, for all volumes of the node.
type kube struct {
	server  string // https://host:port
	client  *http.Client
	refresh time.Duration // how old an object may be that a refresh takes from the cache
	metrics *metrics

	places    chan struct{} // holds an element for each request under way with a Pod's token
	ownPlaces chan struct{} // and for each with the driver's own

	mu         sync.Mutex
	namespaces map[string]*share // of those with calls under way
	held       *holdings
	cache      map[string]*cached
	cacheBytes int
	tidied     time.Time
	reads      map[cacheKey]*reading // under way
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
		return nil, errors.New("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the driver runs in a Pod only")
	}
	pem, err := os.ReadFile(filepath.Join(serviceAccountDir, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("no ServiceAccount: %w; the Pod needs serviceAccountName and automountServiceAccountToken", err)
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
	return &kube{
		server: "https://" + net.JoinHostPort(host, port),
		client: &http.Client{
			Transport:     transport,
			Timeout:       requestTimeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		refresh:    refresh,
		metrics:    m,
		places:     make(chan struct{}, maxRequests),
		ownPlaces:  make(chan struct{}, maxOwnRequests),
		namespaces: map[string]*share{},
		held:       newHoldings(),
		cache:      map[string]*cached{},
		reads:      map[cacheKey]*reading{},
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

// call is one publish, as far as the API server and the memory of its objects are concerned.
type call struct {
	kube      *kube
	namespace string // the Pod's
	share     *share
	objects   []*apiObject
	size      int // of objects, in bytes
	limit     int // of size
}

// begin begins a call for a Pod of the namespace. The caller ends it. A volume that is mounted goes on when it is
// larger than a new one may be.
func (k *kube) begin(namespace string, mounted bool) *call {
	limit := maxVolumeObjectsBytes
	if mounted {
		limit = maxNamespaceObjectsBytes
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := k.namespaces[namespace]
	if s == nil {
		s = &share{places: make(chan struct{}, maxNamespaceRequests), held: newHoldings()}
		k.namespaces[namespace] = s
	}
	s.calls++
	return &call{kube: k, namespace: namespace, share: s, limit: limit}
}

func (c *call) end() {
	k := c.kube
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, o := range c.objects {
		k.held.remove(o)
		c.share.held.remove(o)
	}
	if c.share.calls--; c.share.calls == 0 {
		delete(k.namespaces, c.namespace)
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

// objectError is returned for an object that is refused as it is, roomError where there is no room for one at this moment.
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
		return objectError{fmt.Errorf("it has %d KiB, with which the Connectors and ConnectorClasses of the volume have more than %d KiB together",
			size>>10, c.limit>>10)}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if namespace, all := c.share.held.with(o), k.held.with(o); namespace > maxNamespaceObjectsBytes || all > maxObjectsBytes {
		return roomError{fmt.Errorf("the volumes that are being published would hold objects of %d KiB with it, and those of namespace %q "+
			"of %d KiB; there is room for %d and %d KiB", all>>10, c.namespace, namespace>>10, maxObjectsBytes>>10, maxNamespaceObjectsBytes>>10)}
	}
	c.objects = append(c.objects, o)
	c.size += size
	k.held.add(o)
	c.share.held.add(o)
	return nil
}

// connector reads a Connector with the token of the Pod that mounts it, so that the API server decides whether
// the Pod's ServiceAccount may.
func (k *kube) connector(ctx context.Context, c *call, pod podIdentity, token string, ref reference, fresh bool) (*apiObject, error) {
	path := connectorsAPI + "/namespaces/" + ref.namespace + "/connectors/" + ref.name
	key := cacheKey{path: path, reader: pod.namespace + "/" + pod.serviceAccount}
	return k.get(ctx, key, fresh, func(ctx context.Context) (*apiObject, error) {
		return k.getObject(ctx, []chan struct{}{c.share.places, k.places}, "connectors", path, token)
	})
}

// class reads a ConnectorClass with the driver's own token.
func (k *kube) class(ctx context.Context, c *call, name string, fresh bool) (*apiObject, error) {
	path := connectorsAPI + "/connectorclasses/" + name
	return k.get(ctx, cacheKey{path: path}, fresh, func(ctx context.Context) (*apiObject, error) {
		token, err := ownToken()
		if err != nil {
			return nil, err
		}
		return k.getObject(ctx, []chan struct{}{c.share.places, k.ownPlaces}, "connectorclasses", path, token)
	})
}

func (k *kube) getObject(ctx context.Context, places []chan struct{}, resource, path, token string) (*apiObject, error) {
	data, err := k.do(ctx, places, resource, http.MethodGet, path, token, nil)
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
// when the Pod's uid is another. When to renew it is counted from the request, by the monotonic clock: the node's
// time of day may be another than the API server's.
func (k *kube) requestToken(ctx context.Context, c *call, pod podIdentity, audiences []string, lifetime time.Duration) (issuedToken, error) {
	seconds := int64(lifetime / time.Second)
	spec := map[string]any{
		"expirationSeconds": seconds,
		"boundObjectRef":    map[string]any{"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid},
	}
	if len(audiences) > 0 {
		spec["audiences"] = audiences
	}
	body, err := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec})
	if err != nil {
		return issuedToken{}, err
	}
	own, err := ownToken()
	if err != nil {
		return issuedToken{}, err
	}
	asked := time.Now()
	path := "/api/v1/namespaces/" + url.PathEscape(pod.namespace) + "/serviceaccounts/" + url.PathEscape(pod.serviceAccount) + "/token"
	data, err := k.do(ctx, []chan struct{}{c.share.places, k.ownPlaces}, "serviceaccounts/token", http.MethodPost, path, own, body)
	if err != nil {
		return issuedToken{}, err
	}
	var answer struct {
		Spec   struct{ ExpirationSeconds int64 }
		Status struct{ Token string }
	}
	if json.Unmarshal(data, &answer) != nil || answer.Status.Token == "" || len(answer.Status.Token) > maxTokenBytes {
		return issuedToken{}, &apiError{http.StatusBadGateway, "the answer to the TokenRequest has no token, or a huge one"}
	}
	if granted := answer.Spec.ExpirationSeconds; granted > 0 {
		seconds = min(seconds, granted) // the API server may have a limit of its own
	}
	renew := asked.Add(time.Duration(seconds) * time.Second * 8 / 10)
	return issuedToken{answer.Status.Token, renew, lifetime, audiences}, nil
}

// apiObject is an object as the API server sent it, with the few fields that the driver itself needs. It is never
// decoded here: a small text can take fifty times its size then. Nobody may change it, since volumes share it.
type apiObject struct {
	raw             []byte
	namespace, name string
	uid, version    string // metadata.uid, metadata.resourceVersion
	class           string // of a Connector: spec.connectorClassName
	proxyAddress    string // status.proxyAddress
	proxyURL        string // status.proxy.httpAddress.url
	proxyAudience   string // status.proxy.httpAddress.audience
	classAudience   string // of a class: spec.proxy.audience
}

// parseObject reads the fields of an object.
func parseObject(raw []byte) (*apiObject, error) {
	o := &apiObject{raw: raw}
	wanted := fields{
		"metadata": fields{"namespace": &o.namespace, "name": &o.name, "uid": &o.uid, "resourceVersion": &o.version},
		"spec":     fields{"connectorClassName": &o.class, "proxy": fields{"audience": &o.classAudience}},
		"status": fields{
			"proxyAddress": &o.proxyAddress,
			"proxy":        fields{"httpAddress": fields{"url": &o.proxyURL, "audience": &o.proxyAudience}},
		},
	}
	if !json.Valid(raw) || raw[skipSpace(raw, 0)] != '{' {
		return nil, &apiError{http.StatusBadGateway, "the answer is not a Kubernetes object"}
	}
	scanValue(raw, 0, wanted)
	return o, nil
}

// fields are the wanted ones of a JSON object by name: a *string for a string, fields for an object.
type fields map[string]any

// scanValue goes over one value of a valid JSON text, from i on, stores what is wanted of it, and returns where it
// ends. Unlike encoding/json it takes no memory, whatever the text, and names count to the letter, as they do in
// templates: encoding/json would take "URL" for "url".
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
	for i < len(text) && !bytes.ContainsRune([]byte(" \t\r\n,]}"), rune(text[i])) { // a number, true, false or null
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
type cacheKey struct{ path, reader string }

// cached is an object of the cache, once for all who read it.
type cached struct {
	object  *apiObject
	began   time.Time            // when the read began that gave it
	used    time.Time            // when it was asked for last
	readers map[string]time.Time // when the last read of each reader began that the API server allowed
}

// reading is a read under way, which everyone waits for who needs the object.
type reading struct {
	done     chan struct{}
	object   *apiObject
	err      error
	abandons bool // the one who reads has given up
}

// get returns an object from the cache, or reads it:
//
//  1. a fresh read, for a first publish, asks the API server itself, whatever others do, so that this very
//     token is checked and this very moment seen
//  2. otherwise the cache serves while the reader's last read is younger than the refresh interval
//  3. a read that is under way for the same reader is waited for
//  4. or else this call reads, for all who wait
func (k *kube) get(ctx context.Context, key cacheKey, fresh bool, read func(context.Context) (*apiObject, error)) (*apiObject, error) {
	// 1. fresh
	if fresh {
		return k.readAndKeep(ctx, key, read)
	}
	for {
		// 2. cached
		k.mu.Lock()
		if c := k.cache[key.path]; c != nil && time.Since(c.readers[key.reader]) < k.refresh {
			c.used = time.Now()
			k.mu.Unlock()
			return c.object, nil
		}

		// 3. under way
		if r := k.reads[key]; r != nil {
			k.mu.Unlock()
			select {
			case <-r.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if !r.abandons {
				return r.object, r.err
			}
			continue
		}

		// 4. read
		r := &reading{done: make(chan struct{})}
		k.reads[key] = r
		k.mu.Unlock()
		r.object, r.err = k.readAndKeep(ctx, key, read)
		r.abandons = r.err != nil && ctx.Err() != nil
		k.mu.Lock()
		delete(k.reads, key)
		k.mu.Unlock()
		close(r.done)
		return r.object, r.err
	}
}

// readAndKeep reads an object and keeps it in the cache. Of two reads the one counts that began later, whichever
// ends first: what is returned may be newer than what was read, and is never older than what was returned before.
func (k *kube) readAndKeep(ctx context.Context, key cacheKey, read func(context.Context) (*apiObject, error)) (*apiObject, error) {
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
		if c.object.uid != o.uid || c.object.version != o.version {
			k.cacheBytes += len(o.raw) - len(c.object.raw)
			c.object = o
		}
	}
	if c.used = time.Now(); began.After(c.readers[key.reader]) {
		c.readers[key.reader] = began
	}
	o = c.object
	k.evict()
	return o, nil
}

// tidy drops, once a minute, what no volume has asked for in a long time, so that the cache follows the volumes of
// the node. The caller holds the lock.
func (k *kube) tidy() {
	if time.Since(k.tidied) < time.Minute {
		return
	}
	k.tidied = time.Now()
	for path, c := range k.cache {
		maps.DeleteFunc(c.readers, func(_ string, began time.Time) bool { return time.Since(began) > 3*k.refresh+5*time.Minute })
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

func (k *kube) drop(path string) {
	k.cacheBytes -= len(k.cache[path].object.raw)
	delete(k.cache, path)
}

// do sends one request and returns what the API server answers with. It takes a place in each of the channels for
// it. It waits as the API server asks (429 and 503 with Retry-After) and tries again, for as long as ctx allows.
func (k *kube) do(ctx context.Context, places []chan struct{}, resource, method, path, token string, body []byte) ([]byte, error) {
	for {
		answer, wait, err := k.once(ctx, places, resource, method, path, token, body)
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
func (k *kube) once(ctx context.Context, places []chan struct{}, resource, method, path, token string, body []byte) (_ []byte, wait time.Duration, _ error) {
	for _, p := range places {
		select {
		case p <- struct{}{}:
			defer func() { <-p }()
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		}
	}
	request, err := http.NewRequestWithContext(ctx, method, k.server+path, bytes.NewReader(body))
	if err != nil {
		return nil, 0, err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "connectors-csi/"+version)
	if body != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	response, err := k.client.Do(request)
	if err != nil {
		k.metrics.inc("connectors_csi_api_requests_total", "resource", resource, "code", "none")
		return nil, 0, err
	}
	defer response.Body.Close()
	k.metrics.inc("connectors_csi_api_requests_total", "resource", resource, "code", strconv.Itoa(response.StatusCode))
	data, err := io.ReadAll(io.LimitReader(response.Body, maxObjectBytes+1))
	if err != nil || response.StatusCode/100 == 2 {
		return data, 0, err
	}
	wait, err = decodeFailure(response, data)
	return nil, wait, err
}

// decodeFailure takes the error and the time to wait out of an answer. One that is not Kubernetes' own is never
// quoted.
func decodeFailure(response *http.Response, data []byte) (wait time.Duration, _ error) {
	var answer struct{ Kind, Message string }
	if json.Unmarshal(data, &answer) != nil || answer.Kind != "Status" || answer.Message == "" {
		answer.Message = http.StatusText(response.StatusCode)
	}
	if response.StatusCode == http.StatusTooManyRequests || response.StatusCode == http.StatusServiceUnavailable {
		if seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 16); err == nil {
			wait = time.Duration(max(seconds, 1)) * time.Second
		}
	}
	return wait, &apiError{response.StatusCode, answer.Message}
}

// podIdentity is whom a Pod's token belongs to.
type podIdentity struct {
	namespace, serviceAccount, name, uid string
	audiences                            []string
}

// parseIdentity reads the claims of a Pod's token without checking its signature: that is the API server's,
// which accepts the token, or not, before anything comes of the claims.
func parseIdentity(token string) (podIdentity, error) {
	malformed := errors.New("the token that kubelet passed is not one of a Pod's ServiceAccount")
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return podIdentity{}, malformed
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return podIdentity{}, malformed
	}
	var claims struct {
		Audience   json.RawMessage `json:"aud"`
		Kubernetes struct {
			Namespace      string `json:"namespace"`
			ServiceAccount struct {
				Name string `json:"name"`
			} `json:"serviceaccount"`
			Pod struct {
				Name string `json:"name"`
				UID  string `json:"uid"`
			} `json:"pod"`
		} `json:"kubernetes.io"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return podIdentity{}, malformed
	}
	c := claims.Kubernetes
	pod := podIdentity{namespace: c.Namespace, serviceAccount: c.ServiceAccount.Name, name: c.Pod.Name, uid: c.Pod.UID}
	if pod.namespace == "" || pod.serviceAccount == "" || pod.name == "" || pod.uid == "" {
		return podIdentity{}, malformed
	}
	if err := json.Unmarshal(claims.Audience, &pod.audiences); err != nil { // RFC 7519: one string, or a list
		pod.audiences = make([]string, 1)
		if err := json.Unmarshal(claims.Audience, &pod.audiences[0]); err != nil {
			return podIdentity{}, malformed
		}
	}
	return pod, nil
}
