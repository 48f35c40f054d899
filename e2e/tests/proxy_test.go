package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	"github.com/elazarl/goproxy"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/node"
)

// What the driver's files are for: proxies that ask the API server who a token's bearer is, and whether he may
// use the Connector.

// gitServer serves the repository team/app.git to those who know its password.
func gitServer(t *testing.T) *url.URL {
	t.Helper()
	backend, err := node.GitBackend(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return behindPassword(t, backend)
}

const (
	targetUser     = "proxy"
	targetPassword = "known to the proxy only"
)

// behindPassword serves to those who know the target's password.
func behindPassword(t *testing.T, handler http.Handler) *url.URL {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != targetUser || password != targetPassword {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	address, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// reverseProxy is a proxy as the product has them: it puts the target's credentials in the place of the token, if
// the API server confirms the token and lets its owner read the Connector.
func (ns namespace) reverseProxy(target *url.URL, connector string) string {
	forward := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.SetBasicAuth(targetUser, targetPassword)
	}}
	return serveToPods(ns.T, func(w http.ResponseWriter, r *http.Request) {
		header := r.Header.Get("Authorization")
		if header == "" { // container-registry clients ask first what they are to show
			w.Header().Set("WWW-Authenticate", `Basic realm="connectors"`)
			http.Error(w, "no token", http.StatusUnauthorized)
			return
		}
		if _, err := authorize(header, []string{ns.name + "/" + connector}); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		forward.ServeHTTP(w, r)
	})
}

// forwardProxy is a proxy that serves those whose user name lists exactly these Connectors, and whose token
// lets them read all of them.
func forwardProxy(t *testing.T, connectors []string, forward http.HandlerFunc) string {
	return serveToPods(t, func(w http.ResponseWriter, r *http.Request) {
		user, err := authorize(r.Header.Get("Proxy-Authorization"), connectors)
		if err == nil && user != strings.Join(connectors, ",") {
			err = fmt.Errorf("the user is %q", user)
		}
		if err != nil {
			w.Header().Set("Proxy-Authenticate", `Basic realm="connectors"`)
			http.Error(w, err.Error(), http.StatusProxyAuthRequired)
			return
		}
		forward(w, r)
	})
}

// tlsProxy is a forward proxy as the product has them: it ends the client's TLS with a certificate of its own CA,
// which Connectors name in their status, and adds the target's credentials.
func (ns namespace) tlsProxy(target *url.URL, connector string) string {
	proxy := goproxy.NewProxyHttpServer()
	proxy.OnRequest().HandleConnect(goproxy.AlwaysMitm)
	proxy.OnRequest().DoFunc(func(r *http.Request, _ *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		r.URL.Scheme, r.URL.Host = target.Scheme, target.Host
		r.SetBasicAuth(targetUser, targetPassword)
		return r, nil
	})
	return forwardProxy(ns.T, []string{ns.name + "/" + connector}, proxy.ServeHTTP)
}

// authorize checks the token in a header: the API server must confirm it and let its owner read all these
// Connectors. It returns the user name that stands before the token.
func authorize(header string, connectors []string) (userName string, err error) {
	userName, token, err := basicCredentials(header)
	if err != nil {
		return "", err
	}
	u, err := reviewToken(token)
	if err != nil {
		return "", err
	}
	for _, connector := range connectors {
		namespace, name, _ := strings.Cut(connector, "/")
		if err := mayRead(u, namespace, name); err != nil {
			return "", err
		}
	}
	return userName, nil
}

// serveToPods serves HTTP at an address that Pods can reach, and returns it.
func serveToPods(t *testing.T, handler http.HandlerFunc) string {
	t.Helper()
	listener, err := net.Listen("tcp", node.IP+":0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return "http://" + listener.Addr().String()
}

// user is whom the API server takes the bearer of a token for.
type user struct {
	Username string              `json:"username"`
	Groups   []string            `json:"groups"`
	Extra    map[string][]string `json:"extra"`
}

// pod returns the name and the uid of the Pod that the token is bound to.
func (u user) pod() (name, uid string) {
	extra := func(key string) string { return strings.Join(u.Extra["authentication.kubernetes.io/"+key], ",") }
	return extra("pod-name"), extra("pod-uid")
}

// reviewToken asks the API server whose token this is.
func reviewToken(token string) (user, error) {
	var review struct {
		Status struct {
			Authenticated bool   `json:"authenticated"`
			Error         string `json:"error"`
			User          user   `json:"user"`
		} `json:"status"`
	}
	err := createReview("authentication.k8s.io/v1", "TokenReview", map[string]any{"token": token}, &review)
	if err == nil && !review.Status.Authenticated {
		err = fmt.Errorf("the API server does not accept the token: %s", review.Status.Error)
	}
	return review.Status.User, err
}

// mayRead asks the API server whether a user may read a Connector.
func mayRead(u user, namespace, connector string) error {
	var review struct {
		Status struct {
			Allowed bool `json:"allowed"`
		} `json:"status"`
	}
	err := createReview("authorization.k8s.io/v1", "SubjectAccessReview", map[string]any{
		"user": u.Username, "groups": u.Groups,
		"resourceAttributes": map[string]any{
			"group": "connectors.alauda.io", "resource": "connectors", "verb": "get", "namespace": namespace, "name": connector,
		},
	}, &review)
	if err == nil && !review.Status.Allowed {
		err = fmt.Errorf("%s may not read Connector %s/%s", u.Username, namespace, connector)
	}
	return err
}

// createReview creates one of the objects with which one asks the API server, and reads its answer.
func createReview(apiVersion, kind string, spec, answer any) error {
	question, err := json.Marshal(map[string]any{"apiVersion": apiVersion, "kind": kind, "spec": spec})
	if err != nil {
		return err
	}
	output, err := cluster.KubectlStdin(string(question), "create", "-f", "-", "--output=json")
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(output), answer)
}

// basicCredentials reads the header Authorization or Proxy-Authorization.
func basicCredentials(header string) (user, token string, err error) {
	request := http.Request{Header: http.Header{"Authorization": {header}}}
	user, token, ok := request.BasicAuth()
	if !ok {
		return "", "", errors.New("no user and token")
	}
	return user, token, nil
}

// wantTokenOf checks that the API server takes a token for that of a Pod and its ServiceAccount.
func (ns namespace) wantTokenOf(token, namespace, serviceAccount, pod string) {
	ns.Helper()
	u, err := reviewToken(token)
	if err != nil {
		ns.Fatal(err)
	}
	if want := "system:serviceaccount:" + namespace + ":" + serviceAccount; u.Username != want {
		ns.Errorf("the token is that of %s, not of %s", u.Username, want)
	}
	uid, err := cluster.Kubectl("--namespace", namespace, "get", "pod", pod, "--output=jsonpath={.metadata.uid}")
	if err != nil {
		ns.Fatal(err)
	}
	if name, boundTo := u.pod(); name != pod || boundTo != uid {
		ns.Errorf("the token is bound to Pod %q, uid %q, not to Pod %s, uid %s", name, boundTo, pod, uid)
	}
}
