package examples

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"
	"time"

	"github.com/elazarl/goproxy"
)

// tool is a program that reads the files of an example.
type tool struct {
	name    string // of the directory in examples
	reverse bool   // it asks the proxy as if that were the target
	user    string // as which it asks the proxy, if that matters
	target  http.Handler

	// For sh, in an empty directory that is its home, with the volume in $VOLUME, the Connector's address without a slash
	// at its end in $ADDRESS, and the proxy's in $SCHEME and, without scheme and user, $PROXY.
	script  string
	reaches []string // the paths below the address, or below the reverse proxy
	prints  []string

	cases  []example
	cannot map[string]string // the cases that are beyond the tool, whatever the file holds, and what it prints then
}

// example is a Connector. Where a field is empty, it is that of ordinary, with the tool's name in the place of NAME.
type example struct {
	name, address, proxy string
	withoutCA            bool   // the status has none, since the system's are right
	refused              string // why there are no files
}

var ordinary = example{address: "https://NAME.example.com/main", proxy: "http://proxy.example.com:8080"}

// addresses are those of targets.
var addresses = []example{
	{name: "host", address: "https://NAME.example.com"},
	{name: "slash", address: "https://NAME.example.com/"},
	{name: "port", address: "https://NAME.example.com:8443"},
	{name: "https port", address: "https://NAME.example.com:443/main"},
	{name: "path", address: "https://NAME.example.com/repository/main"},
	{name: "path with slash", address: "https://NAME.example.com:8443/repository/main/"},
	{name: "encoded slash", address: "https://NAME.example.com/group%2Fproject"},
	{name: "encoded", address: "https://NAME.example.com/a%20b/%C3%A9%26/"},
	{name: "IPv6", address: "https://[fd00::1]"},
	{name: "IPv6 with port and path", address: "https://[fd00::1]:8443/main/"},
	{name: "IPv6 and http", address: "http://[fd00::1]:8081/main"},
	{name: "user", address: "https://somebody@NAME.example.com/main"},
	{name: "upper case", address: "HTTPS://NAME.Example.COM/Main"},
	{name: "http", address: "http://NAME.example.com:8081/main"},
	{name: "http port", address: "http://NAME.example.com:80/main"},
	{name: "http and no CA", address: "http://NAME.example.com/main", withoutCA: true},
	{name: "signs", address: "https://NAME.example.com/a;b&c/(d)*,e!~@f=+:g/"},
}

// forwardProxies are proxies whose host and port count.
var forwardProxies = []example{
	{name: "proxy without port", proxy: "http://c-NAME-connector.default.svc.cluster.local"},
	{name: "proxy with slash", proxy: "http://proxy.example.com:8080/"},
	{name: "proxy with http port", proxy: "http://proxy.example.com:80"},
	{name: "proxy with path", proxy: "http://proxy.example.com:8080/namespaces/default/connectors/NAME"},
	{name: "IPv6 proxy", proxy: "http://[fd00::a1]"},
	{name: "IPv6 proxy with port", proxy: "http://[fd00::a1]:8080"},
	{name: "proxy with user", proxy: "http://somebody@proxy.example.com:8080"},
	{name: "upper case proxy", proxy: "HTTP://Proxy.Example.COM:8080"},
	{name: "proxy without CA", withoutCA: true},
}

// httpsProxies are those of them that only some tools can reach.
var httpsProxies = []example{
	{name: "https proxy", proxy: "https://secure.example.com"},
	{name: "https proxy with port", proxy: "https://secure.example.com:8443/"},
	{name: "https proxy with https port", proxy: "https://secure.example.com:443"},
	{name: "https IPv6 proxy", proxy: "https://[fd00::a2]:8443"},
	{name: "https proxy without CA", proxy: "https://secure.example.com", withoutCA: true},
}

// reverseProxies are proxies whose paths count too.
var reverseProxies = []example{
	{name: "encoded path of the proxy", proxy: "http://proxy.example.com/group%2Fproject/a%20b/"},
	{name: "signs in the path of the proxy", proxy: "http://proxy.example.com/a;b&c/(d)*,e!~@f=+:g"},
	{name: "https proxy with path", proxy: "https://secure.example.com/namespaces/default/connectors/NAME"},
}

// refused are cases that a template refuses.
func refused(why string, cases []example) []example {
	cases = slices.Clone(cases)
	for i := range cases {
		cases[i].refused = why
	}
	return cases
}

func files(content map[string]string) http.Handler {
	all := fstest.MapFS{}
	for path, text := range content {
		all[path] = &fstest.MapFile{Data: []byte(text)}
	}
	return http.FileServerFS(all)
}

// authorized serves to those who come with this header, which a forward proxy would replace.
func authorized(header string, handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := r.Header.Get("Authorization"); got != header {
			http.Error(w, fmt.Sprintf("not %q but %q", header, got), http.StatusForbidden)
			return
		}
		handler.ServeHTTP(w, r)
	})
}

// wheel is a package of Python's.
func wheel() string {
	var archive bytes.Buffer
	w := zip.NewWriter(&archive)
	for name, content := range map[string]string{
		"METADATA": "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0",
		"WHEEL":    "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any",
		"RECORD":   "",
	} {
		file, err := w.Create("greeting-1.0.dist-info/" + name)
		if err != nil {
			panic(err)
		}
		file.Write([]byte(content))
	}
	w.Close()
	return archive.String()
}

// pythonIndex has the package greeting.
var pythonIndex = files(map[string]string{
	"packages/greeting-1.0-py3-none-any.whl": wheel(),
	"simple/greeting/index.html": `<!DOCTYPE html>
		<a href="../../packages/greeting-1.0-py3-none-any.whl">greeting-1.0-py3-none-any.whl</a>`,
})

// registry has the image greeting:1, with and without a namespace before its name, and nothing but its manifest.
var registry = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/v2/" && !strings.HasSuffix(r.URL.Path, "/greeting/manifests/1") {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	fmt.Fprint(w, `{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 2, "digest":
			"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},
		"layers": [], "annotations": {"greeting": "hello from a registry"}}`)
})

var tools = []tool{
	{
		name:   "curl",
		user:   "default/curl-connector",
		target: files(map[string]string{"greeting": "hello from curl"}),
		script: `curl --silent --show-error --fail --globoff --config "$VOLUME/.curlrc" "$ADDRESS/greeting"`,
		prints: []string{"hello from curl"}, reaches: []string{"/greeting"},
		cannot: map[string]string{"https IPv6 proxy": "no alternative certificate subject name matches"},
		cases:  slices.Concat(addresses, forwardProxies, httpsProxies),
	},
	{
		name: "npm",
		user: "default/npm-connector",
		target: authorized("Basic dXNlcjpwYXNzd29yZA==", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet {
				http.NotFound(w, r)
			}
		})),
		// This one asks its configuration for credentials in two ways.
		script: `mkdir greeting; cd greeting
			echo '{"name": "greeting", "version": "1.0.0"}' >package.json
			npm publish --userconfig "$VOLUME/.npmrc"`,
		prints: []string{"+ greeting@1.0.0"}, reaches: []string{"/greeting"},
		cannot: map[string]string{"IPv6": "ALTNAME_INVALID", "IPv6 with port and path": "ALTNAME_INVALID"},
		cases:  slices.Concat(addresses, forwardProxies, httpsProxies),
	},
	{
		name: "go",
		user: "default/go-connector",
		target: files(map[string]string{
			"greeting.example.com/@v/v1.0.0.info": `{"Version": "v1.0.0", "Time": "2026-01-02T03:04:05Z"}`,
			"greeting.example.com/@v/v1.0.0.mod":  "module greeting.example.com\n",
		}),
		script: `. "$VOLUME/env"; go list -m -f '{{ .Path }} {{ .Time }}' greeting.example.com@v1.0.0`,
		prints: []string{"greeting.example.com 2026-01-02"}, reaches: []string{"/greeting.example.com/@v/v1.0.0.info"},
		cases: slices.Concat(addresses, forwardProxies, httpsProxies),
	},
	{
		name: "maven",
		user: "default/maven-connector",
		target: files(map[string]string{"com/example/parent/1/parent-1.pom": `<project>
			<modelVersion>4.0.0</modelVersion>
			<groupId>com.example</groupId><artifactId>parent</artifactId><version>1</version><packaging>pom</packaging>
			<properties><greeting>hello from maven</greeting></properties>
		</project>`}),
		script: `cat >pom.xml <<-end
			<project>
			  <modelVersion>4.0.0</modelVersion>
			  <parent><groupId>com.example</groupId><artifactId>parent</artifactId><version>1</version><relativePath/></parent>
			  <artifactId>app</artifactId><packaging>pom</packaging><name>\${greeting}</name>
			</project>
			end
			mvn --batch-mode --settings "$VOLUME/settings.xml" -Dmaven.repo.local=repository validate`,
		prints: []string{"Building hello from maven 1"}, reaches: []string{"/com/example/parent/1/parent-1.pom"},
		cannot: map[string]string{
			"IPv6":                    "doesn't match any of the subject alternative names",
			"IPv6 with port and path": "doesn't match any of the subject alternative names",
		},
		cases: slices.Concat(addresses, forwardProxies, refused("Maven needs an http:// address of the proxy", httpsProxies)),
	},
	{
		name:    "git",
		reverse: true,
		target: files(map[string]string{
			"team/app.git/HEAD":      "ref: refs/heads/hello\n",
			"team/app.git/info/refs": "8ab686eafeb1f44702738c8b0f24f2567c36da6d\trefs/heads/hello\n",
		}),
		script: `GIT_CONFIG_GLOBAL="$VOLUME/.gitconfig" git ls-remote "$ADDRESS/team/app.git"`,
		prints: []string{"refs/heads/hello"}, reaches: []string{"/team/app.git/info/refs"},
		cases: slices.Concat(addresses, forwardProxies, httpsProxies, reverseProxies, []example{
			{name: "query", address: "https://git.example.com/app?a=b&c=d"},
			{name: "fragment", address: "https://git.example.com/#/a;b"},
		}),
	},
	{
		name:    "pip",
		reverse: true,
		user:    "default-pip-connector",
		target:  pythonIndex,
		script:  `PIP_CONFIG_FILE="$VOLUME/pip.conf" pip3 download --no-deps greeting`,
		prints:  []string{"Successfully downloaded greeting"}, reaches: []string{"/simple/greeting/", "/packages/greeting-1.0-py3-none-any.whl"},
		cases: slices.Concat(forwardProxies, httpsProxies, reverseProxies),
	},
	{
		name:    "pip", // its other commands, with its own Connector
		reverse: true,
		target:  pythonIndex,
		script: `export PIP_CONFIG_FILE="$VOLUME/pip.conf"
			pip3 wheel --no-deps greeting; pip3 index versions greeting; pip3 install --no-deps --target . greeting`,
		prints: []string{"Saved ./greeting-1.0", "greeting (1.0)", "Successfully installed greeting-1.0"},
	},
	{
		name:    "registry",
		reverse: true,
		user:    "default-registry-connector",
		target:  registry,
		script: `image=$PROXY/greeting:1
			case $SCHEME in
			http) skopeo=--tls-verify=false crane=--insecure;;
			esac
			if test -s "$VOLUME/ca.cert"; then export SSL_CERT_FILE="$VOLUME/ca.cert"; fi
			skopeo inspect ${skopeo:-} --authfile "$VOLUME/config.json" --raw "docker://$image"
			DOCKER_CONFIG=$VOLUME crane manifest ${crane:-} "$image"`,
		prints: []string{"hello from a registry"}, reaches: []string{"/greeting/manifests/1"},
		cannot: map[string]string{
			"IPv6 proxy": "invalid reference format", "IPv6 proxy with port": "invalid reference format",
			"https IPv6 proxy": "invalid reference format",
		},
		cases: slices.Concat(forwardProxies, httpsProxies),
	},
	{
		name:    "registry", // from a volume that is read-only, by a link, as docs/operations.md has it
		reverse: true,
		target:  registry,
		script: `mount --bind "$VOLUME" "$VOLUME"; mount -o remount,bind,ro "$VOLUME"
			! mkdir "$VOLUME/buildx"
			mkdir -p ~/.docker; ln -s "$VOLUME/config.json" ~/.docker/
			mkdir ~/.docker/buildx
			crane manifest --insecure "$PROXY/greeting:1"`,
		prints: []string{"Read-only file system", "hello from a registry"},
	},
	{
		name:   "kubectl",
		user:   "default/kubectl-connector",
		target: files(map[string]string{"version": `{"gitVersion": "v1.2.3-hello"}`}),
		script: `kubectl --kubeconfig "$VOLUME/kubeconfig" get --raw /version`,
		prints: []string{"v1.2.3-hello"}, reaches: []string{"/version"},
		cannot: map[string]string{"encoded slash": "could not find the requested resource"},
		cases:  slices.Concat(addresses, forwardProxies, httpsProxies),
	},
}

// Every example is read by its own tool, which reaches the right place with the right credential, whatever the address
// and the proxy are.
func TestToolsReadTheExamples(t *testing.T) {
	for _, tool := range tools {
		t.Run(tool.name, func(t *testing.T) {
			own := manifest(t, "../../examples/"+tool.name+"/connector.yaml")
			cases := append([]example{{
				name:    "its own Connector",
				address: at[string](t, own, "spec", "address"),
				proxy:   at[string](t, own, "status", "proxy", "httpAddress", "url"), withoutCA: true,
			}}, tool.cases...)
			for _, e := range cases {
				t.Run(e.name, func(t *testing.T) {
					t.Parallel()
					tool.try(t, e)
				})
			}
		})
	}
}

// Addresses with a query or a fragment have no places below them, but the files hold them as they are.
func TestFilesHoldAddressesWithQueries(t *testing.T) {
	const address = "https://somebody@host.example.com:8443/a;b/(c)*!?d=e&f=[g]~+%20,h#i/@j"
	for _, c := range []struct{ name, script, want string }{
		{"go", `. "$VOLUME/env"; printf %s "$GOPROXY"`, strings.ReplaceAll(address, ",", "%2C")},
		{"maven", `xmllint --xpath 'string(//url)' "$VOLUME/settings.xml"`, address + "\n"},
		{"npm", `npm config get registry --userconfig "$VOLUME/.npmrc"`, strings.ReplaceAll(address, "=", "%3D") + "/\n"},
		{"kubectl", `kubectl --kubeconfig "$VOLUME/kubeconfig" config view --output jsonpath='{.clusters[0].cluster.server}'`, address},
	} {
		rendered, err := tool{name: c.name}.render(t, example{address: address, proxy: ordinary.proxy}, "TOKEN")
		if err != nil {
			t.Fatal(err)
		}
		if got, err := runScript(t, c.script, false, "VOLUME="+rendered); err != nil || got != c.want {
			t.Errorf("%s reads %q (%v), not %q", c.name, got, err, c.want)
		}
	}
}

// token makes one as long as a real one.
func token() string {
	random := make([]byte, 700)
	rand.Read(random)
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"RS256"}`)) + "." + encode(random[:400]) + "." + encode(random[400:])
}

func (tool tool) try(t *testing.T, e example) {
	t.Helper()
	fill := func(given, otherwise string) string {
		if given == "" {
			given = otherwise
		}
		return strings.ReplaceAll(given, "NAME", tool.name)
	}
	e.address, e.proxy = fill(e.address, ordinary.address), fill(e.proxy, ordinary.proxy)
	token := token()
	rendered, err := tool.render(t, e, token)
	if e.refused != "" {
		if err == nil || !strings.Contains(err.Error(), e.refused) {
			t.Errorf("%v, but %q is expected", err, e.refused)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	v := &visit{user: tool.user, target: tool.target}
	address, err := url.Parse(e.address)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := url.Parse(e.proxy)
	if err != nil {
		t.Fatal(err)
	}
	if v.base = address; tool.reverse {
		v.base = proxy
	}
	if tool.name == "registry" { // an image has the proxy's path in its name
		v.base = &url.URL{Scheme: proxy.Scheme, Host: proxy.Host}
	}
	visits.Store(token, v)
	defer visits.Delete(token)
	output, err := runScript(t, tool.script, e.withoutCA,
		"VOLUME="+rendered, "ADDRESS="+strings.TrimSuffix(e.address, "/"), "PROXY="+proxy.Host+strings.TrimSuffix(proxy.Path, "/"), "SCHEME="+proxy.Scheme)
	if message := tool.cannot[e.name]; message != "" && err != nil && strings.Contains(output, message) {
		t.Log("the tool cannot:", message)
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, text := range tool.prints {
		if !strings.Contains(output, text) {
			t.Errorf("it does not print %q", text)
		}
	}
	for _, path := range tool.reaches {
		if !slices.ContainsFunc(v.reached, func(p string) bool { return strings.HasSuffix(p, path) }) {
			t.Errorf("it does not reach %s below %s, but %q", path, v.base, v.reached)
		}
	}
	if err != nil || len(v.faults) > 0 {
		t.Errorf("%v; the proxy says %q", err, v.faults)
	}
	if t.Failed() {
		t.Logf("it prints\n%s", output)
		for name, content := range contents(t, rendered) {
			if name != "ca.cert" {
				t.Logf("%s:\n%s", name, strings.ReplaceAll(content, token, "TOKEN"))
			}
		}
	}
}

// render renders the tool's example for a Connector. The files know their directory as that of the Pod's volume.
func (tool tool) render(t *testing.T, e example, token string) (string, error) {
	t.Helper()
	dir := "../../examples/" + tool.name
	connector := manifest(t, dir+"/connector.yaml")
	at[map[string]any](t, connector, "spec")["address"] = e.address
	status := map[string]any{"url": e.proxy}
	if !e.withoutCA {
		status["CACerts"] = string(goproxy.CA_CERT)
	}
	at[map[string]any](t, connector, "status", "proxy")["httpAddress"] = status
	pod := manifest(t, dir+"/pod.yaml")
	volume := at[[]any](t, pod, "spec", "volumes")[0].(map[string]any)
	rendered, err := render(t, at[string](t, volume, "csi", "volumeAttributes", "configuration.names"), token,
		manifest(t, dir+"/class.yaml"), connector)
	if err == nil {
		moveTo(t, rendered, "/etc/"+tool.name+"/")
	}
	return rendered, err
}

// contents returns the files of a directory by name.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(dir + "/" + entry.Name())
		if err != nil {
			t.Fatal(err)
		}
		all[entry.Name()] = string(content)
	}
	return all
}

// moveTo replaces, in the files of a directory, the one at which a Pod mounts them by their own.
func moveTo(t *testing.T, dir, mountPath string) {
	t.Helper()
	for name, content := range contents(t, dir) {
		if err := os.WriteFile(dir+"/"+name, []byte(strings.ReplaceAll(content, mountPath, dir+"/")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// runScript runs a script with nothing of this process's environment, since there may be settings for tools, and
// returns what it prints. It is told to trust the proxy's CA if that is what the system does.
func runScript(t *testing.T, script string, systemCA bool, environment ...string) (string, error) {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-euc", script)
	environment = append(environment, "PATH="+programs+":"+os.Getenv("PATH"), "HOME="+dir,
		"GOFLAGS=-modcacherw", "GOTOOLCHAIN=local", // so that the directory can be removed
		"npm_config_fetch_retries=0", "npm_config_update_notifier=false", "PIP_RETRIES=0",
		"MAVEN_OPTS=-XX:TieredStopAtLevel=1 -Dmaven.resolver.transport=wagon "+
			"-Djavax.net.ssl.trustStore="+programs+"/keys -Djavax.net.ssl.trustStorePassword=changeit")
	if systemCA {
		cmd = exec.CommandContext(ctx, "sh", "-euc", `mount --bind "$1" "$2"; exec sh -euc "$0"`, script, programs+"/ca.pem", systemCAs)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		for _, name := range []string{"NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"} { // npm and pip have CAs of their own
			environment = append(environment, name+"="+systemCAs)
		}
	}
	cmd.Dir = dir
	cmd.Env = environment
	cmd.WaitDelay = time.Second
	output, err := cmd.CombinedOutput()
	return string(output), err
}
