package examples

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/elazarl/goproxy"
)

// One server is every proxy, on the ports that proxies have, by http and https: forward proxy for those who ask it for
// an address, reverse proxy for all others. Who is asking shows by the token, of which each case has its own.

// The proxy's addresses by scheme. None has both, since some clients try https first.
var proxyAddresses = map[string][]string{
	"http":  {proxyIPv4 + ":80", proxyIPv4 + ":8080", "[" + proxyIPv6 + "]:80", "[" + proxyIPv6 + "]:8080"},
	"https": {secureIPv4 + ":443", secureIPv4 + ":8443", "[" + secureIPv6 + "]:443", "[" + secureIPv6 + "]:8443"},
}

// They exist in this process's network only. Some clients have exceptions for those that all machines have.
const (
	proxyIPv4, proxyIPv6   = "10.0.0.1", "fd00::a1"
	secureIPv4, secureIPv6 = "10.0.0.2", "fd00::a2"
	secureName             = "secure.example.com"
)

// proxyNames are the names of the proxy that speaks http.
func proxyNames() []string {
	names := []string{"proxy.example.com"}
	classes, _ := filepath.Glob("../../examples/*/class.yaml")
	for _, class := range classes {
		names = append(names, "c-"+filepath.Base(filepath.Dir(class))+"-connector.default.svc.cluster.local")
	}
	return names
}

// visit is what the proxy expects of the one who has a token, and keeps of him.
type visit struct {
	user   string       // the user name, or "" if any will do
	base   *url.URL     // what he may ask for, with all below
	target http.Handler // what is there

	mu      sync.Mutex
	reached []string // the paths below base
	faults  []string
}

func (v *visit) fault(format string, args ...any) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.faults = append(v.faults, fmt.Sprintf(format, args...))
}

// visits are by token.
var visits sync.Map

func visitor(header string) (*visit, error) {
	request := http.Request{Header: http.Header{"Authorization": {header}}}
	user, token, _ := request.BasicAuth()
	found, ok := visits.Load(token)
	if !ok {
		return nil, errors.New("no token")
	}
	v := found.(*visit)
	if v.user != "" && user != v.user {
		v.fault("the user is %q", user)
		return nil, errors.New("another user")
	}
	return v, nil
}

// origin returns a URL's scheme, host and port.
func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return u.Scheme + "://" + net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// segments returns the parts of a URL's path, decoded: "a%2Fb" is one.
func segments(u *url.URL) []string {
	all := strings.Split(strings.Trim(u.EscapedPath(), "/"), "/")
	for i, segment := range all {
		if plain, err := url.PathUnescape(segment); err == nil {
			all[i] = plain
		}
	}
	return all
}

// serve answers a request for a URL, if that is where the visitor may go.
func (v *visit) serve(w http.ResponseWriter, r *http.Request, asked *url.URL) {
	base, path := segments(v.base), segments(asked)
	if v.base.Path == "" || v.base.Path == "/" {
		base = nil
	}
	if origin(asked) != origin(v.base) || len(path) < len(base) || strings.Join(path[:len(base)], "\n") != strings.Join(base, "\n") {
		v.fault("%s was asked for, which is not below %s", asked, v.base)
		http.NotFound(w, r)
		return
	}
	below := r.Clone(context.Background())
	below.URL = &url.URL{Path: "/" + strings.Join(path[len(base):], "/"), RawQuery: asked.RawQuery}
	if strings.HasSuffix(asked.Path, "/") && len(path) > len(base) {
		below.URL.Path += "/"
	}
	v.mu.Lock()
	v.reached = append(v.reached, below.URL.Path)
	v.mu.Unlock()
	v.target.ServeHTTP(w, below)
}

type visitKey struct{}

// startProxies starts the proxy on all its ports.
func startProxies() error {
	forward := goproxy.NewProxyHttpServer()
	forward.Logger = log.New(io.Discard, "", 0)
	forward.OnRequest().HandleConnectFunc(func(host string, ctx *goproxy.ProxyCtx) (*goproxy.ConnectAction, string) {
		v := ctx.Req.Context().Value(visitKey{}).(*visit)
		if "https://"+strings.ToLower(host) != origin(v.base) {
			v.fault("a connection to %s was asked for", host)
		}
		ctx.UserData = v
		return goproxy.MitmConnect, host
	})
	forward.OnRequest().DoFunc(func(r *http.Request, ctx *goproxy.ProxyCtx) (*http.Request, *http.Response) {
		v, ok := ctx.UserData.(*visit) // through a connection
		if !ok {
			v = r.Context().Value(visitKey{}).(*visit)
		}
		answer := httptest.NewRecorder()
		v.serve(answer, r, r.URL)
		response := answer.Result()
		response.Request = r
		return r, response
	})
	certificate, err := proxyCertificate()
	if err != nil {
		return err
	}
	listen := func(scheme, address string) error {
		listener, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		if scheme == "https" {
			listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{certificate}})
		}
		go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodConnect || r.URL.IsAbs() {
				v, err := visitor(r.Header.Get("Proxy-Authorization"))
				if err != nil {
					w.Header().Set("Proxy-Authenticate", `Basic realm="connectors"`)
					http.Error(w, err.Error(), http.StatusProxyAuthRequired)
					return
				}
				forward.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), visitKey{}, v)))
				return
			}
			v, err := visitor(r.Header.Get("Authorization"))
			if err != nil {
				w.Header().Set("WWW-Authenticate", `Basic realm="connectors"`)
				http.Error(w, err.Error(), http.StatusUnauthorized)
				return
			}
			asked := *r.URL
			asked.Scheme, asked.Host = scheme, r.Host
			v.serve(w, r, &asked)
		}))
		return nil
	}
	for scheme, addresses := range proxyAddresses {
		for _, address := range addresses {
			err = errors.Join(err, listen(scheme, address))
		}
	}
	return err
}

// proxyCertificate makes the certificate of the proxy itself, by the CA that it has for its targets too.
func proxyCertificate() (tls.Certificate, error) {
	ca, err := x509.ParseCertificate(goproxy.GoproxyCa.Certificate[0])
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		NotBefore:    time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: []string{secureName}, IPAddresses: []net.IP{net.ParseIP(secureIPv6)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, key.Public(), goproxy.GoproxyCa.PrivateKey)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
