package tests

import (
	"archive/zip"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/elazarl/goproxy"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
)

// The clients that the product documents, beside git and curl, which other tests run in Pods. These here run on
// the machine, with the directory of a Pod's volume: an image that has them would be large.

// clientNeeds are those that the machine must have. The node brings kubectl.
func clientNeeds() []machine.Need {
	return []machine.Need{
		{"npm", "npm", machine.HasCommand("npm")},
		{"pip", "python3-pip", machine.HasCommand("pip3")},
		{"Maven", "maven", machine.HasCommand("mvn")},
		{"keytool", "default-jre-headless", machine.HasCommand("keytool")},
		{"OpenSSL", "openssl", machine.HasCommand("openssl")},
		{"skopeo", "skopeo", machine.HasCommand("skopeo")},
		{"psql", "postgresql-client", psql() != ""},
		{"jq", "jq", machine.HasCommand("jq")},
	}
}

// client is a program that needs the token to reach its target through the proxy. Its class, its Connector and its Pod
// are those of the directory with its name in examples.
type client struct {
	name   string
	proxy  func(ns namespace, target *url.URL, connector string) string
	target func(t *testing.T) http.Handler

	// For sh, in an empty directory, with a copy of the volume in $VOLUME and the proxy's host and port in $PROXY.
	script  string
	prints  string
	refused string // what it prints without the token
}

// All proxies have a CA, and all addresses are https://NAME.example.com.
var clients = []client{
	{
		name:   "curl",
		proxy:  namespace.tlsProxy,
		target: func(*testing.T) http.Handler { return serve(map[string]string{"greeting": "hello from curl"}) },
		script: `curl --silent --show-error --config "$VOLUME/.curlrc" https://curl.example.com/greeting`,
		prints: "hello from curl", refused: "407",
	},
	{
		name:   "npm",
		proxy:  namespace.tlsProxy,
		target: npmRegistry,
		script: `npm install --userconfig "$VOLUME/.npmrc" greeting && node --print 'require("greeting")'`,
		prints: "hello from npm", refused: "407",
	},
	{
		name:   "pip",
		proxy:  namespace.reverseProxy,
		target: pythonIndex,
		script: `PIP_CONFIG_FILE="$VOLUME/pip.conf" pip3 install -vv --no-deps --target . greeting &&
			python3 -c 'import greeting; print(greeting.text)'`,
		prints: "hello from pip", refused: "403",
	},
	{
		name:   "go",
		proxy:  namespace.tlsProxy,
		target: goModules,
		script: `. "$VOLUME/env"
			go run greeting.example.com@v1.0.0`,
		prints: "hello from go", refused: "Proxy Authentication Required",
	},
	{
		name:   "maven",
		proxy:  namespace.tlsProxy,
		target: mavenRepository,
		script: `keytool -importcert -noprompt -keystore keys -storepass changeit -alias corp-ca -file "$VOLUME/ca.cert"
			cat >pom.xml <<-end
			<project>
			  <modelVersion>4.0.0</modelVersion>
			  <parent><groupId>com.example</groupId><artifactId>parent</artifactId><version>1</version><relativePath/></parent>
			  <artifactId>app</artifactId><packaging>pom</packaging><name>\${greeting}</name>
			</project>
			end
			export MAVEN_OPTS="-Dmaven.resolver.transport=wagon
			  -Djavax.net.ssl.trustStore=$PWD/keys -Djavax.net.ssl.trustStorePassword=changeit"
			mvn --batch-mode --settings "$VOLUME/settings.xml" -Dmaven.repo.local=repository validate`,
		prints: "Building hello from maven 1", refused: "407",
	},
	{
		name:   "registry",
		proxy:  namespace.reverseProxy,
		target: containerRegistry,
		script: `skopeo inspect --tls-verify=false --authfile "$VOLUME/config.json" --config "docker://$PROXY/greeting:1"`,
		prints: "hello-from-a-registry", refused: "StatusCode: 403",
	},
	{
		name:  "kubectl",
		proxy: namespace.tlsProxy,
		target: func(*testing.T) http.Handler {
			return serve(map[string]string{"version": `{"major": "1", "minor": "2", "gitVersion": "v1.2.3-hello"}`})
		},
		script: `kubectl --kubeconfig "$VOLUME/kubeconfig" version`,
		prints: "Server Version: v1.2.3-hello", refused: "Proxy Authentication Required",
	},
}

// inMemory makes a file system of files by path.
func inMemory(files map[string]string) fs.FS {
	all := fstest.MapFS{}
	for path, content := range files {
		all[path] = &fstest.MapFile{Data: []byte(content)}
	}
	return all
}

func serve(files map[string]string) http.Handler { return http.FileServerFS(inMemory(files)) }

// npmRegistry has the package "greeting".
func npmRegistry(t *testing.T) http.Handler {
	t.Helper()
	files := map[string]string{}
	addNPMPackage(t, files, "greeting", `module.exports = "hello from npm"`)
	return serve(files)
}

// addNPMPackage adds a package to the files of the registry npm.example.com.
func addNPMPackage(t *testing.T, files map[string]string, name, script string) {
	t.Helper()
	archive, err := image.Tarball([]image.File{
		{Name: "package/package.json", Mode: 0o644, Content: fmt.Appendf(nil, `{"name": %q, "version": "1.0.0"}`, name)},
		{Name: "package/index.js", Mode: 0o644, Content: []byte(script)},
	})
	if err != nil {
		t.Fatal(err)
	}
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	_, err = w.Write(archive)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	files[name+".tgz"] = compressed.String()
	files[name] = fmt.Sprintf(`{"name": %[1]q, "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": {
		"name": %[1]q, "version": "1.0.0", "dist": {"tarball": "https://npm.example.com/%[1]s.tgz"}}}}`, name)
}

// goModules has the module greeting.example.com, a program.
func goModules(t *testing.T) http.Handler {
	t.Helper()
	const module = "module greeting.example.com\n"
	var archive bytes.Buffer
	w := zip.NewWriter(&archive)
	err := w.AddFS(inMemory(map[string]string{
		"greeting.example.com@v1.0.0/go.mod":  module,
		"greeting.example.com@v1.0.0/main.go": `package main; func main() { println("hello from go") }`,
	}))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return serve(map[string]string{
		"greeting.example.com/@v/list":        "v1.0.0\n",
		"greeting.example.com/@v/v1.0.0.info": `{"Version": "v1.0.0"}`,
		"greeting.example.com/@v/v1.0.0.mod":  module,
		"greeting.example.com/@v/v1.0.0.zip":  archive.String(),
	})
}

// pythonIndex has the package "greeting".
func pythonIndex(t *testing.T) http.Handler {
	t.Helper()
	var wheel bytes.Buffer
	w := zip.NewWriter(&wheel)
	err := w.AddFS(inMemory(map[string]string{
		"greeting.py":                     "text = 'hello from pip'",
		"greeting-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0",
		"greeting-1.0.dist-info/WHEEL":    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
		"greeting-1.0.dist-info/RECORD":   "",
	}))
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	const name = "greeting-1.0-py3-none-any.whl"
	return serve(map[string]string{
		"packages/" + name:           wheel.String(),
		"simple/greeting/index.html": `<!DOCTYPE html><a href="/packages/` + name + `">` + name + `</a>`,
	})
}

// mavenRepository has a parent for projects.
func mavenRepository(*testing.T) http.Handler {
	return serve(map[string]string{"com/example/parent/1/parent-1.pom": `<project>
		<modelVersion>4.0.0</modelVersion>
		<groupId>com.example</groupId><artifactId>parent</artifactId><version>1</version><packaging>pom</packaging>
		<properties><greeting>hello from maven</greeting></properties>
	</project>`})
}

// containerRegistry has the image greeting:1.
func containerRegistry(t *testing.T) http.Handler {
	t.Helper()
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(handler)
	defer server.Close()
	name, err := name.NewTag(strings.TrimPrefix(server.URL, "http://") + "/greeting:1")
	if err != nil {
		t.Fatal(err)
	}
	greeting, err := image.New("", []string{"hello-from-a-registry"}, nil).Build(image.HostPlatform)
	if err := errors.Join(err, remote.Write(name, greeting)); err != nil {
		t.Fatal(err)
	}
	return handler
}

func TestClientsReachTheirTargetsWithTheToken(t *testing.T) {
	beside(t, "--builtin-files") // one of which is the token
	ns := namespace{t, "default"}
	ns.kubectl("create", "rolebinding", "clients", "--clusterrole=connectors-connector-viewer-role",
		"--serviceaccount=default:default")
	t.Cleanup(func() { cluster.Kubectl("delete", "rolebinding", "clients") })
	proxies := map[string]string{}
	for _, c := range clients {
		dir, connector := "../examples/"+c.name, c.name+"-connector"
		ns.kubectl("apply", "-f", dir)
		t.Cleanup(func() { cluster.Kubectl("delete", "-f", dir, "--wait=false") })
		proxies[c.name] = c.proxy(ns, behindPassword(t, c.target(t)), connector)
		status, err := json.Marshal(map[string]any{"status": map[string]any{"proxy": map[string]any{
			"httpAddress": map[string]any{"url": proxies[c.name], "CACerts": string(goproxy.CA_CERT)},
		}}})
		if err != nil {
			t.Fatal(err)
		}
		ns.kubectl("patch", "connector", connector, "--subresource=status", "--type=merge", "--patch", string(status))
	}
	for _, c := range clients {
		t.Run(c.name, func(t *testing.T) {
			ns := namespace{t, ns.name}
			ns.running(c.name + "-client")
			volume := cluster.VolumeDir(ns.uid(c.name+"-client"), c.name+"-config")
			token := readFile(t, volume+"/context.token")
			if output, err := c.run(t, c.copy(t, volume, token, token), proxies[c.name]); err != nil ||
				!strings.Contains(output, c.prints) {
				t.Errorf("with the token: %v:\n%s", err, output)
			}
			if output, err := c.run(t, c.copy(t, volume, token, "none"), proxies[c.name]); err == nil ||
				!strings.Contains(output, c.refused) {
				t.Errorf("without the token: %v:\n%s", err, output)
			}
		})
	}
}

// run runs the client's script and returns what it printed.
func (c client) run(t *testing.T, volume, proxy string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	cmd := exec.Command("sh", "-euc", c.script)
	cmd.Dir = dir
	// Nothing else of the environment: there may be settings for clients.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "VOLUME=" + volume,
		"PROXY=" + strings.TrimPrefix(proxy, "http://"),
		"GOFLAGS=-modcacherw"} // so that the directory can be removed
	output, err := cmd.CombinedOutput()
	return string(output), err
}

// encoded is a word that may have a token in it.
var encoded = regexp.MustCompile(`[A-Za-z0-9+/]{100,}=*`)

// copy returns a directory with the files of a volume, in which its own path stands for that at which the Pod mounts
// the volume, and another word for the token.
func (c client) copy(t *testing.T, volume, token, other string) string {
	t.Helper()
	dir := t.TempDir()
	replace := func(content string) string { return strings.ReplaceAll(content, token, other) }
	for path, content := range filesBelow(t, volume) {
		content = encoded.ReplaceAllStringFunc(replace(content), func(word string) string {
			plain, err := base64.StdEncoding.DecodeString(word)
			if err != nil {
				return word
			}
			return base64.StdEncoding.EncodeToString([]byte(replace(string(plain))))
		})
		content = strings.ReplaceAll(content, "/etc/"+c.name+"/", dir+"/")
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(path)), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
