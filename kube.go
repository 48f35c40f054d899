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
	requestsAtOnce = 16
	maxAnswerBytes = 8 << 20 // etcd holds objects of at most about 1.5 MiB
)

// kube reads from the Kubernetes API, for all volumes of the node.
type kube struct {
	server  string // https://host:port
	client  *http.Client
	slots   chan struct{} // a place for each request under way
	refresh time.Duration // how old an object may be that a refresh takes from the cache
	metrics *metrics

	mu    sync.Mutex
	cache map[cacheKey]*cached
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
		MaxIdleConnsPerHost: requestsAtOnce,
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
		slots:   make(chan struct{}, requestsAtOnce),
		refresh: refresh,
		metrics: m,
		cache:   map[cacheKey]*cached{},
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

// connector reads a Connector with the token of the Pod that mounts it, so that the API server decides whether
// the Pod's ServiceAccount may.
func (k *kube) connector(ctx context.Context, pod podIdentity, token string, ref reference, fresh bool) (object, error) {
	path := connectorsAPI + "/namespaces/" + ref.namespace + "/connectors/" + ref.name
	key := cacheKey{path: path, reader: pod.namespace + "/" + pod.serviceAccount}
	return k.get(ctx, key, fresh, func(ctx context.Context) (object, error) {
		return k.do(ctx, "connectors", http.MethodGet, path, token, nil)
	})
}

// class reads a ConnectorClass with the driver's own token.
func (k *kube) class(ctx context.Context, name string, fresh bool) (object, error) {
	path := connectorsAPI + "/connectorclasses/" + name
	return k.get(ctx, cacheKey{path: path}, fresh, func(ctx context.Context) (object, error) {
		token, err := ownToken()
		if err != nil {
			return nil, err
		}
		return k.do(ctx, "connectorclasses", http.MethodGet, path, token, nil)
	})
}

// issuedToken is a token that the driver asked for.
type issuedToken struct {
	value string
	renew time.Time // when 80 % of its lifetime are over, as kubelet does it
}

// requestToken asks for a token of the Pod's ServiceAccount that ends with the Pod: the API server refuses it
// when the Pod's uid is another.
func (k *kube) requestToken(ctx context.Context, pod podIdentity, audiences []string, lifetime time.Duration) (issuedToken, error) {
	spec := map[string]any{
		"expirationSeconds": int64(lifetime / time.Second),
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
	answer, err := k.do(ctx, "serviceaccounts/token", http.MethodPost, path, own, body)
	if err != nil {
		return issuedToken{}, err
	}
	expires, err := time.Parse(time.RFC3339, stringAt(answer, "status", "expirationTimestamp"))
	value := stringAt(answer, "status", "token")
	if err != nil || value == "" {
		return issuedToken{}, &apiError{http.StatusBadGateway, "the answer to the TokenRequest has no token"}
	}
	return issuedToken{value: value, renew: asked.Add(expires.Sub(asked) * 8 / 10)}, nil
}

// cacheKey names an object and who reads it: what one ServiceAccount may see, another may not.
type cacheKey struct{ path, reader string }

// cached is one object of the cache. Whoever holds its turn reads for everyone who waits.
type cached struct {
	turn    chan struct{} // holds one element, the turn
	value   object
	err     error
	started time.Time // when the read began that gave value or err, or when this place was made
}

// get returns an object from the cache, or reads it:
//
//  1. a fresh read, for a first publish, asks the API server itself, whatever others do, so that this very
//     token is checked and this very moment seen
//  2. otherwise one at a time looks at the object, and takes it as it is while it is younger than the
//     refresh interval, or if it was read since this call began, even if that failed
//  3. or else reads it for all who wait
//
// Nobody may change the object: others share it.
func (k *kube) get(ctx context.Context, key cacheKey, fresh bool, read func(context.Context) (object, error)) (object, error) {
	// 1. fresh
	entry := k.entry(key)
	if fresh {
		started := time.Now()
		value, err := read(ctx)
		if err != nil {
			return nil, err
		}
		select {
		case <-entry.turn:
			entry.store(value, nil, started)
			entry.turn <- struct{}{}
		default: // somebody reads it at this moment
		}
		return value, nil
	}

	// 2. shared
	called := time.Now()
	select {
	case <-entry.turn:
		defer func() { entry.turn <- struct{}{} }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if entry.err == nil && entry.value != nil && time.Since(entry.started) < k.refresh || entry.started.After(called) {
		return entry.value, entry.err
	}

	// 3. read
	started := time.Now()
	value, err := read(ctx)
	if err != nil && ctx.Err() != nil {
		return nil, err // of this call alone
	}
	entry.store(value, err, started)
	return value, err
}

// store keeps the outcome of a read, unless a later one is kept already. The caller holds the turn.
func (c *cached) store(value object, err error, started time.Time) {
	if started.After(c.started) {
		c.value, c.err, c.started = value, err, started
	}
}

// entry finds or makes the place of an object in the cache. Making one drops those that no volume has asked
// for in a long time, so the cache follows the volumes of the node.
func (k *kube) entry(key cacheKey) *cached {
	k.mu.Lock()
	defer k.mu.Unlock()
	if entry := k.cache[key]; entry != nil {
		return entry
	}
	for key, entry := range k.cache {
		select {
		case <-entry.turn: // nobody is at it
			if time.Since(entry.started) > 3*k.refresh+5*time.Minute {
				delete(k.cache, key)
			}
			entry.turn <- struct{}{}
		default:
		}
	}
	entry := &cached{turn: make(chan struct{}, 1), started: time.Now()}
	entry.turn <- struct{}{}
	k.cache[key] = entry
	return entry
}

// do sends one request and returns the object that the API server answers with. It waits as the API server
// asks (429 and 503 with Retry-After) and tries again, for as long as ctx allows.
func (k *kube) do(ctx context.Context, resource, method, path, token string, body []byte) (object, error) {
	for {
		answer, wait, err := k.once(ctx, resource, method, path, token, body)
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
func (k *kube) once(ctx context.Context, resource, method, path, token string, body []byte) (_ object, wait time.Duration, _ error) {
	select {
	case k.slots <- struct{}{}:
		defer func() { <-k.slots }()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
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
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswerBytes))
	if err != nil {
		return nil, 0, err
	}
	return decodeAnswer(response, data)
}

// decodeAnswer takes the object, or the error and the time to wait, out of an answer. An answer that is not
// Kubernetes' own is never quoted.
func decodeAnswer(response *http.Response, data []byte) (object, time.Duration, error) {
	value, err := decodeJSON(data)
	answer, isObject := value.(object)
	if response.StatusCode/100 == 2 {
		if err != nil || !isObject {
			return nil, 0, &apiError{http.StatusBadGateway, "the answer is not a Kubernetes object"}
		}
		return answer, 0, nil
	}
	message := stringAt(answer, "message")
	if stringAt(answer, "kind") != "Status" || message == "" {
		message = http.StatusText(response.StatusCode)
	}
	var wait time.Duration
	if response.StatusCode == http.StatusTooManyRequests || response.StatusCode == http.StatusServiceUnavailable {
		if seconds, err := strconv.ParseUint(response.Header.Get("Retry-After"), 10, 16); err == nil {
			wait = time.Duration(max(seconds, 1)) * time.Second
		}
	}
	return nil, wait, &apiError{response.StatusCode, message}
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
