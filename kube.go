package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
)

const (
	connectorsAPI = "/apis/connectors.alauda.io/v1alpha1"

	requestTimeout = 15 * time.Second

	// Requests at once, with Pods' tokens, and as many with the driver's own: in all, and for the Pods of one
	// namespace.
	maxRequests          = 16
	maxNamespaceRequests = 4
	// Answers that are read at once, of those that are larger than what each request may have. One namespace
	// may have both.
	maxLargeAnswers  = 2
	smallAnswerBytes = 64 << 10

	// etcd holds objects of at most about 1.5 MiB, which JSON can make longer.
	maxObjectBytes = 3 << 20
	// The objects of a new volume together, those of the volumes under way for the Pods of one namespace, and
	// in all. A mounted volume may have as much as its namespace, so that what grew goes on.
	maxVolumeObjectsBytes    = 4 << 20
	maxNamespaceObjectsBytes = 6 << 20
	maxObjectsBytes          = 16 << 20
	// maxCacheBytes is what the cache keeps; what was used longest ago leaves first.
	maxCacheBytes = 4 << 20

	maxTokenBytes = 16 << 10

	// Watches at once: in all, for the Pods of one namespace, and with the driver's own token. Objects beyond
	// are polled.
	maxWatches          = 256
	maxNamespaceWatches = 64
	maxOwnWatches       = 128

	// A watch lasts for some time from the smaller to the larger, so that those of a node do not end together.
	minWatchTime, maxWatchTime = 25 * time.Minute, 30 * time.Minute
	// How long the driver waits before it opens a watch again.
	maxReopenTime    = 30 * time.Second // at most, after it was lost
	firstRefusedTime = 5 * time.Second  // to three times as long, after it was refused once
	refusedTime      = 4 * time.Minute  // to twice as long, after more
	maxPostponeTime  = 5 * time.Minute  // at most, by Retry-After

	maxEventBytes = 4 << 10 // that are looked into, for which each watch has a buffer

	noVersion      = ""  // of no object
	unknownVersion = "?" // of an object of which no more is known
)

// kubeConfig is what kube needs to know of its surroundings.
type kubeConfig struct {
	server    string        // https://host:port of the API server
	directory string        // with the token and the CA of the driver's own ServiceAccount
	refresh   time.Duration // how old an object that is not watched may be for a refresh
	log       *slog.Logger
	metrics   *metrics
}

// kube speaks to the Kubernetes API for all volumes of the node.
type kube struct {
	kubeConfig
	client *http.Client

	requests     *queue // for requests with Pods' tokens
	ownRequests  *queue // and with the driver's own
	largeAnswers *queue // for the large answers of both

	mu         sync.Mutex                   // guards what follows
	charged    map[string]int               // bytes of lookups' objects, by the Pod's namespace; of all by ""
	entries    map[string]map[string]*entry // by path, then by reader
	cacheBytes int                          // of the objects in entries; a shared one counts for each
	watches    map[string]int               // by the namespace of the reader; those of the driver by ""
}

// newKube connects to the API server. Proxy settings of the environment are ignored: no Pod's token may go to
// one. The CA is read once: a new one of the cluster needs new Pods of the DaemonSet.
func newKube(c kubeConfig) (*kube, error) {
	pem, err := os.ReadFile(filepath.Join(c.directory, "ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("no ServiceAccount: %w; the Pod needs serviceAccountName and "+
			"automountServiceAccountToken", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("no certificate in %s/ca.crt", c.directory)
	}
	transport := &http.Transport{
		TLSClientConfig:       &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2:     true,
		MaxIdleConnsPerHost:   maxRequests,
		DisableCompression:    true, // what limits an answer's size counts what comes over the network
		IdleConnTimeout:       5 * time.Minute,
		TLSHandshakeTimeout:   requestTimeout,
		ResponseHeaderTimeout: requestTimeout,
		// Pings find out that a connection is dead, which TCP alone may take a quarter of an hour for.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 5 * time.Second,
			MaxReceiveBufferPerStream: smallAnswerBytes},
	}
	noRedirect := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	k := &kube{
		kubeConfig:   c,
		client:       &http.Client{Transport: transport, CheckRedirect: noRedirect},
		requests:     newRequestQueue(maxRequests),
		ownRequests:  newRequestQueue(maxRequests),
		largeAnswers: newRequestQueue(maxLargeAnswers),
		charged:      map[string]int{},
		entries:      map[string]map[string]*entry{},
		watches:      map[string]int{},
	}
	_, err = k.ownToken()
	return k, err
}

// ownToken returns the token of the driver's ServiceAccount. Kubelet replaces the file before the token
// expires.
func (k *kube) ownToken() (string, error) {
	token, err := os.ReadFile(filepath.Join(k.directory, "token"))
	if err != nil {
		return "", fmt.Errorf("no ServiceAccount token: %w", err)
	}
	return strings.TrimSpace(string(token)), nil
}

// lookup is what one publish or push asks the API server for, each object once, and what it keeps meanwhile. It is
// one goroutine's.
type lookup struct {
	subscriber *subscriber
	pod        podIdentity
	token      string // the Pod's
	first      bool   // nothing counts that was read before; Connectors are read with this very token
	renewal    bool   // what the volume was given last is current: the Pod's token may have expired

	kube    *kube
	began   time.Time
	objects map[*entry]*apiObject // that it asked for; nil if it was not given one
	sizes   sizes
}

// begin begins a lookup, in which the caller has said for whom it is, and which the caller ends. The objects
// of a mounted volume may be larger than those of a new one.
func (k *kube) begin(l *lookup) *lookup {
	l.kube, l.began, l.objects, l.sizes.limit = k, time.Now(), map[*entry]*apiObject{}, maxVolumeObjectsBytes
	if !l.first {
		l.sizes.limit = maxNamespaceObjectsBytes
	}
	return l
}

// end lets go of the objects and the entries that the lookup has.
func (l *lookup) end() {
	k := l.kube
	k.mu.Lock()
	defer k.mu.Unlock()
	for e, o := range l.objects {
		for _, of := range []string{l.pod.namespace, ""} {
			if o == nil {
				continue
			}
			if o.holders[of]--; o.holders[of] == 0 {
				delete(o.holders, of)
				k.charged[of] -= len(o.raw)
			}
			if k.charged[of] == 0 {
				delete(k.charged, of)
			}
		}
		e.lookups--
		k.dropUnused(e)
	}
}

// sizes are those of the objects of one volume, in bytes.
type sizes struct{ sum, limit int }

// add counts one more object, or refuses it.
func (s *sizes) add(o *apiObject) error {
	size := len(o.raw)
	if size > maxObjectBytes {
		return errObjectSize
	}
	if s.sum+size > s.limit {
		return failuref(codes.FailedPrecondition, "it has %d KiB, with which the Connectors and "+
			"ConnectorClasses of the volume have more than %d KiB together", size>>10, s.limit>>10)
	}
	s.sum += size
	return nil
}

var errObjectSize = failuref(codes.FailedPrecondition, "it has more than %d KiB", maxObjectBytes>>10)

// charge charges the lookup for an object until its end. One that several lookups have counts once, since
// they share it.
func (l *lookup) charge(e *entry, o *apiObject) error {
	if err := l.sizes.add(o); err != nil {
		return err
	}
	k := l.kube
	k.mu.Lock()
	defer k.mu.Unlock()
	with := func(of string) int {
		if o.holders[of] > 0 {
			return k.charged[of]
		}
		return k.charged[of] + len(o.raw)
	}
	namespace, all := with(l.pod.namespace), with("")
	if namespace > maxNamespaceObjectsBytes || all > maxObjectsBytes {
		return failuref(codes.ResourceExhausted, "the volumes that are being published would hold objects of "+
			"%d KiB with it, and those of namespace %q of %d KiB; there is room for %d and %d KiB", all>>10,
			l.pod.namespace, namespace>>10, maxObjectsBytes>>10, maxNamespaceObjectsBytes>>10)
	}
	k.charged[l.pod.namespace], k.charged[""] = namespace, all
	if o.holders == nil {
		o.holders = map[string]int{}
	}
	o.holders[l.pod.namespace]++
	o.holders[""]++
	l.objects[e] = o
	return nil
}

// reference names a Connector, or without a namespace a ConnectorClass. Both names are DNS names, which stand in
// a path as they are.
type reference struct{ namespace, name string }

// String returns the name for messages and the log.
func (r reference) String() string { return cut(r.namespace+"/"+r.name, maxQuotedBytes) }

// connector reads a Connector with the token of the Pod that mounts it, so that the API server decides
// whether the Pod's ServiceAccount may.
func (l *lookup) connector(ctx context.Context, ref reference) (*apiObject, error) {
	return l.get(ctx, connectorsAPI+"/namespaces/"+ref.namespace+"/connectors/"+ref.name,
		l.pod.namespace+"/"+l.pod.serviceAccount)
}

// class reads a ConnectorClass with the driver's own token.
func (l *lookup) class(ctx context.Context, name string) (*apiObject, error) {
	return l.get(ctx, connectorsAPI+"/connectorclasses/"+name, "")
}

// issuedToken is a token that the driver asked for, and what it asked for.
type issuedToken struct {
	value     string
	renew     time.Time // when 80 % of its lifetime are over, as kubelet does it
	lifetime  time.Duration
	audiences []string
}

// requestToken asks for a token of the Pod's ServiceAccount that ends with the Pod: the API server refuses
// one for another uid. Its lifetime is counted from the request, by the monotonic clock: the node's time of
// day may be another than the API server's.
func (l *lookup) requestToken(ctx context.Context, audiences []string,
	lifetime time.Duration) (issuedToken, error) {
	pod := l.pod
	seconds := int64(lifetime / time.Second)
	spec := map[string]any{
		"expirationSeconds": seconds,
		"boundObjectRef":    map[string]any{"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid},
	}
	if len(audiences) > 0 {
		spec["audiences"] = audiences
	}
	// The label brings the request before the policy in deploy.yaml that keeps it to the node's own Pods.
	labels := map[string]string{"app.kubernetes.io/name": driverName}
	body, _ := json.Marshal(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"metadata": map[string]any{"labels": labels}, "spec": spec}) // strings and a number, which cannot fail
	asked := time.Now()
	path := "/api/v1/namespaces/" + url.PathEscape(pod.namespace) + "/serviceaccounts/" +
		url.PathEscape(pod.serviceAccount) + "/token"
	data, err := l.request(ctx, path, "", body)
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
// never decoded here, where a small text could take fifty times its size. Nobody may change it, since volumes
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

	holders map[string]int // lookups that hold it, by the Pod's namespace, of all by ""; kube.mu guards it
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
// memory for the rest, and names count to the letter, as they do in templates: encoding/json would take "URL"
// for "url". A name is found if it is written without escapes, as the API server writes those that are
// wanted.
func scanFields(text []byte, wanted fields) (isObject bool) {
	if !json.Valid(text) || skipSpace(text)[0] != '{' {
		return false
	}
	scanValue(text, wanted)
	return true
}

// scanValue stores what is wanted of the value that a valid text begins with, and returns what follows it. A
// number is never all of the text, since it stands in an object.
func scanValue(text []byte, wanted any) (rest []byte) {
	text = skipSpace(text)
	switch opening := text[0]; opening {
	case '"':
		quoted, rest := cutString(text)
		if field, ok := wanted.(*string); ok {
			json.Unmarshal(quoted, field)
		}
		return rest
	case '{', '[':
		members, _ := wanted.(fields)
		for text = skipSpace(text[1:]); text[0] != '}' && text[0] != ']'; {
			var member any
			if opening == '{' {
				var name []byte
				name, text = cutString(text)
				member, text = members[string(name[1:len(name)-1])], skipSpace(text)[len(":"):]
			}
			text = skipSpace(scanValue(text, member))
			text = skipSpace(bytes.TrimPrefix(text, []byte(",")))
		}
		return text[1:]
	}
	return text[bytes.IndexAny(text, " \t\r\n,]}"):] // of a number, true, false or null
}

func skipSpace(text []byte) []byte { return bytes.TrimLeft(text, " \t\r\n") }

// cutString cuts off the string, with its quotes, that the text begins with.
func cutString(text []byte) (quoted, rest []byte) {
	end := 1
	for ; text[end] != '"'; end++ {
		if text[end] == '\\' {
			end++
		}
	}
	return text[:end+1], text[end+1:]
}

// entry is what the driver knows of one object for one reader: what one ServiceAccount may see, another may
// not.
type entry struct {
	path   string
	reader string // namespace/name of a ServiceAccount, or empty for the driver

	// kube.mu guards the rest.
	object        *apiObject // what the reader was given last, as long as the cache has room for it
	used          time.Time  // when it was asked for last
	read          time.Time  // when the request for it began
	outdated      bool       // another reader was given another version later
	reading       *reading   // under way
	lookups       int        // that have asked for it and not ended
	subscriptions map[*subscriber]*subscription
	watch         *watch // nil without a subscription, or if there are too many
}

// reading is a read under way, which all lookups wait for that need the object. Its results are there when done
// is closed.
type reading struct {
	began  time.Time
	done   chan struct{}
	object *apiObject
	err    error
	failed bool // the reading lookup has given up, or its token is refused, which says nothing to others
}

// isCurrent reports whether the lookup may take the object as it is:
//
//   - one for a new token alone, if the volume was given it last
//   - none, if another version is known to be newer
//   - any, if the read of it began later than the lookup
//   - one for a mounted volume, while a watch is open, unless that has named another version since the read
//   - one for a mounted volume, for the refresh interval after the read, or after the end of such a watch
//
// The caller holds the lock.
func (e *entry) isCurrent(l *lookup) bool {
	switch w, s := e.watch, e.subscriptions[l.subscriber]; {
	case e.object == nil:
		return false
	case l.renewal && s != nil && s.version == e.object.version:
		return true
	case e.outdated:
		return false
	case e.read.After(l.began):
		return true
	case l.first || e.predates(e.read) && w.latest != e.object.version:
		return false
	case w != nil && w.open:
		return true
	default:
		refresh := l.kube.refresh
		return time.Since(e.read) < refresh || w != nil && time.Since(w.ended) < refresh
	}
}

// predates reports whether the watch has said something since a read began. The caller holds the lock.
func (e *entry) predates(began time.Time) bool { return e.watch != nil && !began.After(e.watch.heard) }

// entry finds or makes the entry that the lookup asks for, and keeps it until the lookup ends.
func (l *lookup) entry(path, reader string) *entry {
	l.kube.mu.Lock()
	defer l.kube.mu.Unlock()
	readers := l.kube.entries[path]
	if readers == nil {
		readers = map[string]*entry{}
		l.kube.entries[path] = readers
	}
	e := readers[reader]
	if e == nil {
		e = &entry{path: path, reader: reader, subscriptions: map[*subscriber]*subscription{}}
		readers[reader] = e
	}
	l.objects[e] = nil
	e.lookups++
	return e
}

// get returns an object that is current, and charges the lookup for it.
func (l *lookup) get(ctx context.Context, path, reader string) (*apiObject, error) {
	e := l.entry(path, reader)
	o, err := l.find(ctx, e)
	if err != nil {
		return nil, err
	}
	return o, l.charge(e, o)
}

// find returns an object that is current, or reads it:
//
//  1. the cache serves what is current
//  2. a read under way for the same reader is awaited, if what it returns will be current
//  3. or else this lookup reads, for all that wait
//
// The first publish of a volume reads its Connectors by itself, since its own token has to be let in.
func (l *lookup) find(ctx context.Context, e *entry) (*apiObject, error) {
	k, alone := l.kube, l.first && e.reader != ""
	k.mu.Lock()
	for !alone {
		// 1. cached
		if e.isCurrent(l) {
			o := e.object // which another read may replace from now on
			e.used = time.Now()
			k.mu.Unlock()
			return o, nil
		}

		// 2. under way
		r := e.reading
		if r == nil || !r.began.After(l.began) && (l.first || e.predates(r.began)) {
			break
		}
		k.mu.Unlock()
		select {
		case <-r.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if !r.failed {
			return r.object, r.err
		}
		k.mu.Lock()
	}

	// 3. read
	r := &reading{began: time.Now(), done: make(chan struct{})}
	if !alone {
		e.reading = r
	}
	k.mu.Unlock()
	o, err := l.read(ctx, e)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case err == nil:
		o = k.keep(e, o, r.began)
	case isStatus(err, http.StatusForbidden), isStatus(err, http.StatusNotFound):
		k.setObject(e, nil) // it is not the reader's any more
	}
	r.object, r.err = o, err
	r.failed = err != nil && (ctx.Err() != nil || isStatus(err, http.StatusUnauthorized))
	if e.reading == r { // and not a later one
		e.reading = nil
	}
	close(r.done)
	return o, err
}

// read reads the object of an entry.
func (l *lookup) read(ctx context.Context, e *entry) (*apiObject, error) {
	data, err := l.request(ctx, e.path, e.reader, nil)
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxObjectBytes: // and not all of it
		return nil, errObjectSize
	}
	return parseObject(data)
}

// keep puts an object into its entry, unless a later read of the same reader is there, and returns the object
// of the latest. Readers that were given the same version share it, and those that were given another one
// before have to ask the API server again. What was used longest ago leaves the cache. The caller holds the
// lock.
func (k *kube) keep(e *entry, o *apiObject, began time.Time) *apiObject {
	if e.object != nil && !began.After(e.read) {
		return e.object
	}
	outdated := false
	for _, other := range k.entries[e.path] {
		switch {
		case other == e || other.object == nil:
		case other.object.version == o.version:
			o = other.object
		case other.read.After(began):
			outdated = true
		default:
			other.outdated = true
		}
	}
	k.setObject(e, o)
	e.read, e.outdated = began, outdated
	if k.cacheBytes > maxCacheBytes {
		byUse := func(a, b *entry) int { return a.used.Compare(b.used) }
		for _, oldest := range slices.SortedFunc(k.allEntries, byUse) {
			if k.cacheBytes > maxCacheBytes {
				k.setObject(oldest, nil)
			}
		}
	}
	return o
}

// setObject replaces the object of an entry. The caller holds the lock.
func (k *kube) setObject(e *entry, o *apiObject) {
	if e.object != nil {
		k.cacheBytes -= len(e.object.raw)
	}
	if o != nil {
		k.cacheBytes += len(o.raw)
	}
	e.object, e.used = o, time.Now()
}

// allEntries goes over all entries. The caller holds the lock.
func (k *kube) allEntries(yield func(*entry) bool) {
	for _, readers := range k.entries {
		for _, e := range readers {
			if !yield(e) {
				return
			}
		}
	}
}

// dropUnused drops an entry that no volume uses and no lookup has asked for. The caller holds the lock.
func (k *kube) dropUnused(e *entry) {
	if e.lookups > 0 || len(e.subscriptions) > 0 {
		return
	}
	k.setObject(e, nil)
	delete(k.entries[e.path], e.reader)
	if len(k.entries[e.path]) == 0 {
		delete(k.entries, e.path)
	}
}

// subscriber is a volume, which wants to know of changes of the objects that its files are made from.
type subscriber struct {
	notify  func()          // is called, without a lock, when one of them has changed
	entries map[*entry]bool // kube.mu guards it
}

// subscription is what a subscriber knows of an object, and what it is watched with. kube.mu guards it.
type subscription struct {
	version string    // that the last publish was given, whether or not it succeeded
	token   string    // of the Pod, for a Connector
	since   time.Time // when it became the token
	refused bool      // the API server does not accept the token
}

// watch watches one object for one reader, as long as there is a subscription. It says that the object has
// changed; what it is then is read, so that the API server decides at every change whether the reader may
// have it.
type watch struct {
	newToken chan struct{} // has an element when a subscriber has brought another token
	stop     context.CancelFunc
	resume   string // the resourceVersion from which to go on; follow's own

	// kube.mu guards the rest; follow alone writes heard and latest, and reads them without it.
	open   bool
	ended  time.Time // when it was open last, if it is not
	heard  time.Time // when its last event came
	latest string    // the version that its last event named
}

// subscribe subscribes to all objects that the lookup asked for, and with only to no others, and watches
// them. It reports whether an object has changed since the lookup began, of which the subscriber was not
// told.
func (l *lookup) subscribe(only bool) (missed bool) {
	k, u := l.kube, l.subscriber
	k.mu.Lock()
	defer k.mu.Unlock()
	if only {
		for e := range u.entries {
			if _, keeps := l.objects[e]; !keeps {
				k.unsubscribeFrom(u, e)
			}
		}
	}
	for e, o := range l.objects {
		s := e.subscriptions[u]
		if s == nil {
			s = &subscription{}
			e.subscriptions[u], u.entries[e] = s, true
		}
		if o != nil {
			s.version = o.version
		}
		renewed := e.reader != "" && s.token != l.token // the driver's own comes from its file
		if renewed {
			s.token, s.since, s.refused = l.token, time.Now(), false
		}
		w := e.watch
		switch {
		case w == nil:
			k.startWatch(e) // which takes the newest token
		case renewed:
			select {
			case w.newToken <- struct{}{}:
			default:
			}
		}
		missed = missed || w != nil && w.open && w.heard.After(l.began) && w.latest != s.version
	}
	return missed
}

// unsubscribe ends all subscriptions of a subscriber.
func (k *kube) unsubscribe(u *subscriber) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for e := range u.entries {
		k.unsubscribeFrom(u, e)
	}
}

// unsubscribeFrom ends one subscription, and the watch with the last of its object. The caller holds the
// lock.
func (k *kube) unsubscribeFrom(u *subscriber, e *entry) {
	delete(u.entries, e)
	delete(e.subscriptions, u)
	if len(e.subscriptions) == 0 {
		k.stopWatch(e)
		k.dropUnused(e)
	}
}

// startWatch starts a watch, unless there are too many: of the driver's own, of those for the Pods of a
// namespace, or of all. The caller holds the lock.
func (k *kube) startWatch(e *entry) {
	namespace, _, _ := strings.Cut(e.reader, "/")
	limit, all := maxNamespaceWatches, 0
	if namespace == "" {
		limit = maxOwnWatches
	}
	for _, number := range k.watches {
		all += number
	}
	if k.watches[namespace] >= limit || all >= maxWatches {
		return
	}
	k.watches[namespace]++
	ctx, stop := context.WithCancel(context.Background())
	e.watch = &watch{newToken: make(chan struct{}, 1), stop: stop}
	go k.follow(ctx, e, e.watch)
}

// stopWatch stops the watch of an entry, if there is one. The caller holds the lock.
func (k *kube) stopWatch(e *entry) {
	w := e.watch
	if w == nil {
		return
	}
	w.stop()
	k.noteClosed(w)
	e.watch = nil
	namespace, _, _ := strings.Cut(e.reader, "/")
	if k.watches[namespace]--; k.watches[namespace] == 0 {
		delete(k.watches, namespace)
	}
}

// noteClosed notes that a watch is not open any more. The caller holds the lock.
func (k *kube) noteClosed(w *watch) {
	if w.open {
		w.open, w.ended = false, time.Now()
		k.metrics.add(watchesOpen, -1)
	}
}

// follow keeps a watch open until it is stopped:
//
//  1. open it, from where it ended before if it did, and receive its events
//  2. if the API server has forgotten what happened since then (410), or does not take it (400), begin with
//     what there is now
//  3. if a token was refused (401), as that of a deleted Pod is, use another Pod's
//  4. wait: if there is no other token, or the ServiceAccount may not watch the object (403), for another token
//     or some minutes, but after the first refusal some seconds, since an API server that has just started
//     refuses what it allows later; otherwise a random time, since many watches end together, which grows while
//     this one fails
func (k *kube) follow(ctx context.Context, e *entry, w *watch) {
	failures, refusals, warned := 0, 0, false
	for ctx.Err() == nil {
		// 1. open
		select {
		case <-w.newToken: // it is among those to choose from
		default:
		}
		began, from, token := time.Now(), w.resume, k.newestToken(e)
		atLeast, err := k.receive(ctx, e, w, token)
		k.mu.Lock()
		k.noteClosed(w)
		k.mu.Unlock()

		// 2. forgotten
		if (isStatus(err, http.StatusGone) || isStatus(err, http.StatusBadRequest)) && w.resume != "" {
			atOnce := w.resume == from // but not again and again
			w.resume = ""
			if atOnce {
				continue
			}
		}

		// 3. another token
		forbidden, unauthorized := isStatus(err, http.StatusForbidden), isStatus(err, http.StatusUnauthorized)
		if unauthorized && k.markRefused(e, token) {
			continue
		}

		// 4. wait
		failures = min(failures+1, 5)
		if time.Since(began) > maxReopenTime {
			failures = 0
		}
		wait, newToken := reopenTime(failures, atLeast), w.newToken
		refusals++
		switch {
		case !forbidden && !unauthorized:
			refusals, newToken = 0, nil
		case refusals == 1:
			wait = firstRefusedTime + rand.N(2*firstRefusedTime)
		default:
			wait = refusedTime + rand.N(refusedTime)
		}
		if forbidden && refusals > 1 && !warned {
			warned = true
			k.log.Warn("an object is polled, since it may not be watched: grant the verb watch beside get",
				"object", e.path, "reader", cmp.Or(e.reader, driverName), "error", cut(err.Error(), maxMessageBytes))
		}
		select {
		case <-time.After(wait):
		case <-newToken:
		case <-ctx.Done():
		}
	}
}

// reopenTime returns how long to wait before a watch that was lost is opened again: a random time, or as long
// as the API server asks for.
func reopenTime(failures int, atLeast time.Duration) time.Duration {
	return max(rand.N(min(time.Second<<failures, maxReopenTime)), min(atLeast, maxPostponeTime))
}

// newestToken returns the token that kubelet has brought last of those that were not refused, or of all if
// all were.
func (k *kube) newestToken(e *entry) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	newest := &subscription{refused: true}
	for _, s := range e.subscriptions {
		if newest.refused && !s.refused || newest.refused == s.refused && s.since.After(newest.since) {
			newest = s
		}
	}
	return newest.token
}

// markRefused marks a token that the API server has refused, and reports whether there is another.
func (k *kube) markRefused(e *entry, token string) (another bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, s := range e.subscriptions {
		s.refused = s.refused || s.token == token
		another = another || !s.refused
	}
	return another && e.reader != ""
}

// receive opens a watch of the metadata of one object, and handles its events until it ends. Without a
// resourceVersion it begins with the object as it is: that of a read may be too old to begin with, and stays
// so. It returns how long the API server wants not to be asked again, and why the watch ended, unless it did
// so in the usual way.
func (k *kube) receive(ctx context.Context, e *entry, w *watch,
	token string) (atLeast time.Duration, _ error) {
	ctx, cancel := context.WithTimeout(ctx, maxWatchTime+time.Minute)
	defer cancel()
	resource, name := path.Split(e.path)
	lifetime := minWatchTime + rand.N(maxWatchTime-minWatchTime)
	query := url.Values{
		"watch": {"1"}, "allowWatchBookmarks": {"true"}, "fieldSelector": {"metadata.name=" + name},
		"timeoutSeconds": {strconv.Itoa(int(lifetime.Seconds()))},
	}
	if w.resume != "" {
		query.Set("resourceVersion", w.resume)
	}
	uri := strings.TrimSuffix(resource, "/") + "?" + query.Encode()
	response, err := k.send(ctx, "watch", uri, e.reader, token, nil)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		data, err := io.ReadAll(io.LimitReader(response.Body, smallAnswerBytes))
		if err != nil {
			return 0, err
		}
		return decodeFailure(response, data)
	}
	if w.resume != "" {
		k.noteVersion(e, w, w.latest, w.heard) // nothing is missing
	}
	events := bufio.NewReaderSize(response.Body, maxEventBytes)
	for {
		line, isPrefix, err := events.ReadLine()
		switch {
		case errors.Is(err, io.EOF):
			return 0, nil
		case err != nil:
			return 0, err
		case !isPrefix:
			if err := k.handle(e, w, line); err != nil {
				return 0, err
			}
			continue
		}
		for isPrefix && err == nil {
			_, isPrefix, err = events.ReadLine()
		}
		w.resume = "" // whatever a larger event is, something has changed
		k.noteVersion(e, w, unknownVersion, time.Now())
	}
}

// handle handles one event of a watch:
// https://kubernetes.io/docs/reference/using-api/api-concepts/#watch-bookmarks
func (k *kube) handle(e *entry, w *watch, line []byte) error {
	var event struct {
		Type   string
		Object struct {
			Metadata struct{ UID, ResourceVersion string }
			Code     int // of a Status, as Message is
			Message  string
		}
	}
	if err := json.Unmarshal(line, &event); err != nil {
		return &apiError{http.StatusBadGateway, "the watch has something else than events"}
	}
	about := event.Object.Metadata
	switch event.Type {
	case "ADDED", "MODIFIED":
		w.resume = about.ResourceVersion
		k.noteVersion(e, w, contentVersion(about.UID, about.ResourceVersion), time.Now())
	case "DELETED":
		w.resume = about.ResourceVersion
		k.noteVersion(e, w, noVersion, time.Now())
	case "BOOKMARK":
		k.mu.Lock()
		open := w.open
		k.mu.Unlock()
		if !open { // a new watch begins with the object, if there is one
			k.noteVersion(e, w, noVersion, time.Now())
		}
		w.resume = about.ResourceVersion
	case "ERROR":
		return &apiError{event.Object.Code, event.Object.Message}
	default:
		return &apiError{http.StatusBadGateway, "the watch has events of an unknown type"}
	}
	return nil
}

// noteVersion notes what a watch says, which makes it an open one, and notifies the subscribers that
// were given another version.
func (k *kube) noteVersion(e *entry, w *watch, version string, at time.Time) {
	k.mu.Lock()
	if e.watch != w { // it was ended
		k.mu.Unlock()
		return
	}
	if !w.open {
		w.open = true
		k.metrics.add(watchesOpen, 1)
	}
	w.heard, w.latest = at, version
	var others []*subscriber
	for u, s := range e.subscriptions {
		if s.version != version {
			others = append(others, u)
		}
	}
	k.mu.Unlock()
	for _, u := range others {
		u.notify()
	}
}

// newRequestQueue makes a queue for requests, in which the namespace with the fewest under way is next: where
// slow answers to one tenant's many namespaces fill it, another's waits for one of them to end.
func newRequestQueue(capacity int) *queue {
	q := &queue{capacity: capacity}
	q.before = func(a, b *ticket) bool { return q.activeOf(a.namespace) < q.activeOf(b.namespace) }
	q.ready = func(t *ticket) bool { return q.activeOf(t.namespace) < maxNamespaceRequests }
	return q
}

// request sends a request with the reader's token, and returns what the API server answers with. It waits as
// the API server asks (429 and 503 with Retry-After) and tries again, for as long as ctx allows.
func (l *lookup) request(ctx context.Context, path, reader string, body []byte) ([]byte, error) {
	for {
		answer, wait, err := l.requestOnce(ctx, path, reader, body)
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

// requestOnce sends a request when its ticket is active. A wait above zero means that the API server wants to be
// asked again after it.
func (l *lookup) requestOnce(ctx context.Context, path, reader string,
	body []byte) (_ []byte, wait time.Duration, _ error) {
	k, requests, verb := l.kube, l.kube.requests, "get"
	if reader == "" {
		requests = k.ownRequests
	}
	if body != nil {
		verb = "create"
	}
	t := &ticket{namespace: l.pod.namespace}
	if err := requests.acquire(ctx, t); err != nil {
		return nil, 0, err
	}
	defer requests.release(t)
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	response, err := k.send(ctx, verb, path, reader, l.token, body)
	if err != nil {
		return nil, 0, err
	}
	defer response.Body.Close()
	data, err := l.readAnswer(ctx, response.Body)
	if err != nil || response.StatusCode/100 == 2 {
		return data, 0, err
	}
	wait, err = decodeFailure(response, data)
	return nil, wait, err
}

// readAnswer reads an answer, of which only few may be large at a time, since nobody has counted them yet. While
// it waits, its request's ticket and time go on.
func (l *lookup) readAnswer(ctx context.Context, body io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(body, smallAnswerBytes))
	if err != nil || len(data) < smallAnswerBytes {
		return data, err
	}
	t := &ticket{namespace: l.pod.namespace}
	if err := l.kube.largeAnswers.acquire(ctx, t); err != nil {
		return nil, err
	}
	defer l.kube.largeAnswers.release(t)
	return io.ReadAll(io.LimitReader(io.MultiReader(bytes.NewReader(data), body), maxObjectBytes+1))
}

// send sends a request with the reader's token, which for the driver itself is its own, and counts it by what
// the API server has answered, if it has.
func (k *kube) send(ctx context.Context, verb, uri, reader, token string,
	body []byte) (*http.Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, k.server+uri, bytes.NewReader(body))
	if err == nil && reader == "" {
		token, err = k.ownToken()
	}
	if err != nil {
		return nil, err
	}
	resource, accept, code := path.Base(path.Dir(request.URL.Path)), "application/json", "none"
	switch verb {
	case "watch":
		resource = path.Base(request.URL.Path)
		accept = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
	case "create":
		resource, request.Method = "serviceaccounts/token", http.MethodPost
		request.Header.Set("Content-Type", "application/json")
	}
	request.Header.Set("Accept", accept)
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("User-Agent", "connectors-csi/"+version)
	response, err := k.client.Do(request)
	if err == nil {
		code = strconv.Itoa(response.StatusCode)
	}
	k.metrics.inc(apiRequestsTotal, "resource", resource, "verb", verb, "code", code)
	return response, err
}

// isStatus reports whether the error is the API server's answer with this HTTP status.
func isStatus(err error, code int) bool {
	var answer *apiError
	return errors.As(err, &answer) && answer.code == code
}

// decodeFailure returns the error and the time to wait in an answer. One that is not Kubernetes' own is
// never quoted.
func decodeFailure(response *http.Response, data []byte) (wait time.Duration, _ error) {
	var answer struct{ Kind, Message string }
	if json.Unmarshal(data, &answer) != nil || answer.Kind != "Status" || answer.Message == "" {
		answer.Message = http.StatusText(response.StatusCode)
		// An API server that lacks not an object but its kind has no Status for it.
		at := response.Request.URL.Path
		if response.StatusCode == http.StatusNotFound && strings.HasPrefix(at, connectorsAPI) {
			return 0, failuref(codes.FailedPrecondition, "the cluster has no CRD %s.connectors.alauda.io: "+
				"apply the whole of deploy.yaml, or install the Connectors operator", path.Base(path.Dir(at)))
		}
	}
	if response.StatusCode == http.StatusTooManyRequests ||
		response.StatusCode == http.StatusServiceUnavailable {
		if seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 16); err == nil {
			wait = time.Duration(max(seconds, 1)) * time.Second
		}
	}
	return wait, &apiError{response.StatusCode, answer.Message}
}

// podIdentity is whom a Pod's token belongs to.
type podIdentity struct{ namespace, serviceAccount, name, uid string }

var errMalformedToken = errors.New("the token that kubelet passed is not one of a Pod's ServiceAccount")

// parseIdentity reads the claims of a Pod's token without checking its signature. The API server does that at the
// first publish of a volume, before anything comes of the claims; later tokens are kubelet's word.
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

// apiError is an answer of the API server that is not a success: the essence of its Status object.
type apiError struct {
	code    int // HTTP status
	message string
}

func (e *apiError) Error() string {
	return fmt.Sprintf("%s (HTTP %d from the API server)", e.message, e.code)
}

// grpcCodes are what HTTP status means to kubelet; any other is Unavailable.
var grpcCodes = map[int]codes.Code{
	http.StatusBadRequest:          codes.InvalidArgument,
	http.StatusUnprocessableEntity: codes.InvalidArgument,
	http.StatusUnauthorized:        codes.Unauthenticated,
	http.StatusForbidden:           codes.PermissionDenied,
	http.StatusNotFound:            codes.NotFound,
	http.StatusConflict:            codes.Aborted,
	http.StatusTooManyRequests:     codes.ResourceExhausted,
}

// grpcCode is what the answer means to kubelet.
func (e *apiError) grpcCode() codes.Code { return cmp.Or(grpcCodes[e.code], codes.Unavailable) }

// failure is an error whose gRPC code is known where it arises.
type failure struct {
	code codes.Code
	error
}

func (f failure) Unwrap() error { return f.error }

func failuref(code codes.Code, format string, a ...any) error {
	return failure{code, fmt.Errorf(format, a...)}
}

// codeOf is the gRPC code of a failure, of an answer of the API server, or of a context that has ended; OK
// for any other error. For kubelet Unavailable, ResourceExhausted, DeadlineExceeded, Canceled and Aborted
// mean "perhaps mounted": it sends an Unpublish when the Pod goes. All others mean "not mounted".
func codeOf(err error) codes.Code {
	var f failure
	var answer *apiError
	switch {
	case errors.As(err, &f):
		return f.code
	case errors.As(err, &answer):
		return answer.grpcCode()
	case errors.Is(err, context.Canceled):
		return codes.Canceled
	case errors.Is(err, context.DeadlineExceeded):
		return codes.DeadlineExceeded
	}
	return codes.OK
}

// lookupError returns the code and the text for an error of a lookup.
func lookupError(err error) (codes.Code, error) {
	if errors.As(err, new(failure)) || errors.As(err, new(*apiError)) {
		return codeOf(err), err
	}
	return cmp.Or(codeOf(err), codes.Unavailable), fmt.Errorf("no answer from the API server: %w", err)
}

// maxQuotedBytes is how much a message or a log line has of any one thing that a user wrote.
const maxQuotedBytes = 200

// cut returns a text of at most limit bytes as it is, and of a longer one the beginning, as valid UTF-8, with
// a mark.
func cut(text string, limit int) string {
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit], "") + " …"
}
