package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/cgi"
	"os"
	"path/filepath"
	"sync"
	"time"

	"connectors-csi/e2e/machine"
)

// The world outside the cluster: HTTPS servers whose names are below example.com, with certificates of an authority
// that examples/proxy's image trusts.

// TargetCA is the file with the authority's certificate, in the node's directory.
const TargetCA = "target-ca.crt"

// Targets are the servers by name.
type Targets struct {
	key       *ecdsa.PrivateKey
	authority *x509.Certificate

	mu       sync.Mutex
	Handlers map[string]http.Handler
	issued   map[string]*tls.Certificate
}

// startTargets serves them, and the git server of the quick start.
func (n *Node) startTargets() error {
	n.Targets = &Targets{Handlers: map[string]http.Handler{}, issued: map[string]*tls.Certificate{}}
	if err := n.Targets.makeAuthority(n.Path(TargetCA)); err != nil {
		return err
	}
	backend, err := GitBackend(n.Path("repositories"))
	if err != nil {
		return err
	}
	n.Targets.Serve("git.example.com", WithPassword("bot", "change-me", backend)) // examples/proxy/git.yaml has them
	log, err := os.Create(n.Path("targets.log"))
	if err != nil {
		return err
	}
	server := n.Targets.server(log)
	for _, ip := range []string{targetIP, MovedIP} {
		listener, err := net.Listen("tcp", ip+":443")
		if err != nil {
			return err
		}
		go server.ServeTLS(listener, "", "")
	}
	return nil
}

func (t *Targets) server(errors io.Writer) *http.Server {
	return &http.Server{
		Handler:   t,
		TLSConfig: &tls.Config{GetCertificate: t.certificate},
		ErrorLog:  log.New(errors, "", log.LstdFlags),
	}
}

// Serve makes a handler that of a name.
func (t *Targets) Serve(name string, handler http.Handler) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Handlers[name] = handler
}

// ServeHTTP has the handler of the name answer.
func (t *Targets) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t.mu.Lock()
	handler := t.Handlers[r.Host]
	t.mu.Unlock()
	if handler == nil || r.TLS.ServerName != r.Host {
		http.Error(w, "no such server: "+r.Host, http.StatusMisdirectedRequest)
		return
	}
	handler.ServeHTTP(w, r)
}

// makeAuthority makes the authority and writes its certificate.
func (t *Targets) makeAuthority(path string) (err error) {
	if t.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	t.authority = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "the test's authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, t.authority, t.authority, t.key.Public(), t.key)
	if err != nil {
		return err
	}
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// certificate issues that of the name which the client asks for. Two impostors have another one: untrusted, of
// another authority, and misnamed, of another name.
func (t *Targets) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	name := hello.ServerName
	if t.issued[name] == nil {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), DNSNames: []string{name},
			NotBefore: t.authority.NotBefore, NotAfter: t.authority.NotAfter,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		}
		authority := t.authority
		switch name {
		case "untrusted.example.com":
			authority = template // by itself
		case "misnamed.example.com":
			template.DNSNames = []string{"git.example.com"}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, authority, t.key.Public(), t.key)
		if err != nil {
			return nil, err
		}
		t.issued[name] = &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: t.key}
	}
	return t.issued[name], nil
}

// Renew issues a new certificate for a name and returns it with its key.
func (t *Targets) Renew(name string) (certificate, key string, err error) {
	t.mu.Lock()
	delete(t.issued, name)
	t.mu.Unlock()
	issued, err := t.certificate(&tls.ClientHelloInfo{ServerName: name})
	if err != nil {
		return "", "", err
	}
	der, err := x509.MarshalPKCS8PrivateKey(t.key)
	if err != nil {
		return "", "", err
	}
	encode := func(kind string, der []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return encode("CERTIFICATE", issued.Certificate[0]), encode("PRIVATE KEY", der), nil
}

// WithPassword serves to those who know the password, and tells the others that it wants one.
func WithPassword(user, password string, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="target"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

// GitBackend serves, from a directory that it makes, the repository team/app.git to fetch from and to push to.
func GitBackend(dir string) (http.Handler, error) {
	helpers, err := machine.Output("git", "--exec-path")
	if err != nil {
		return nil, err
	}
	if err := machine.Run("sh", "-euc", `
		git init -q -b main "$0/work" && cd "$0/work"
		echo hello > greeting
		git add greeting
		git -c user.name=test -c user.email=test@example.com commit -q -m greeting
		git clone -q --bare . "$0/repositories/team/app.git"
		git -C "$0/repositories/team/app.git" config http.receivepack true`, dir); err != nil {
		return nil, err
	}
	return unchunked(&cgi.Handler{
		Path: filepath.Join(helpers, "git-http-backend"),
		Env:  []string{"GIT_PROJECT_ROOT=" + dir + "/repositories", "GIT_HTTP_EXPORT_ALL=1"},
	}), nil
}

// unchunked gives a CGI program what it wants: requests whose length is known beforehand.
func unchunked(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength < 0 {
			body, err := os.CreateTemp("", machine.Prefix+"body-")
			if err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			defer os.Remove(body.Name())
			defer body.Close()
			length, err := io.Copy(body, r.Body)
			if err != nil {
				return // the client has gone
			}
			if _, err := body.Seek(0, io.SeekStart); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
				return
			}
			r.Body, r.ContentLength, r.TransferEncoding = body, length, nil
		}
		handler.ServeHTTP(w, r)
	})
}
