package tests

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// What the files are, and what tools read from them.

func TestOfSeveralConfigurationsTheLaterWins(t *testing.T) {
	ns := beside(t)
	ns.class("layers", configurations{
		"base": {"settings": "base for {{ .connector.spec.address }}", "only-base": "base"},
		"team": {"settings": "team for {{ .connector.spec.address }}", "only-team": "team"},
		"more": {"not-asked-for": ""},
	})
	ns.connector("target", "layers", "https://one.example.com")
	ns.allow("default", ns)
	ns.pod("team-last", `{connector.name: target, configuration.names: "base,team"}`)
	ns.pod("base-last", `{connector.name: target, configuration.names: "team, base"}`)
	ns.running("team-last", "base-last")

	ns.want("team-last", "/volume/settings", "team for https://one.example.com")
	ns.want("base-last", "/volume/settings", "base for https://one.example.com")
	for _, pod := range []string{"team-last", "base-last"} {
		ns.want(pod, "/volume/only-base", "base")
		ns.want(pod, "/volume/only-team", "team")
		ns.wantFiles(pod, "/volume", "only-base", "only-team", "settings")
	}
}

func TestSeveralConnectorsOfTwoClassesInOneVolume(t *testing.T) {
	ns := beside(t)
	other, closed := newNamespace(t), newNamespace(t)
	ns.apply(`
apiVersion: connectors.alauda.io/v1alpha1
kind: ConnectorClass
metadata: {name: registry}
spec:
  configurations:
  - name: config
    params:
    - {name: kind, default: mirror, enum: [mirror, publish]}
    - {name: scope}
    - {name: tags, type: array, default: [a, b]}
    data:
      registries: |
        {{ .configurations.kind }} of {{ .configurations.scope }}, tags {{ join "+" .configurations.tags }}
        {{- range .connectors }}
        {{ .namespace }}/{{ .name }} is {{ .spec.address }}
        {{- end }}
      both: registry
      unwanted: ""
`)
	ns.class("sources", configurations{"config": {
		"sources": "{{ range .connectors }}{{ .metadata.namespace }}/{{ .metadata.name }} {{ end }}with {{ .configurations.scope }}",
		"both":    "sources",
	}})
	ns.connector("first", "registry", "https://first.example.com")
	other.connector("second", "sources", "https://second.example.com")
	ns.connector("third", "registry", "https://third.example.com")
	closed.connector("closed", "sources", "https://closed.example.com")
	ns.allow("default", ns)
	other.allow("default", ns)

	connectors := fmt.Sprintf(`connectors: "first, %s/second, third"`, other.name)
	const params = `configuration.params: '{"config": {"scope": "acme"}}'`
	ns.pod("pod", `{`+connectors+`, configuration.names: "config,!unwanted", `+params+`}`)
	ns.pod("without-param", `{`+connectors+`, configuration.names: config}`)
	ns.pod("wrong-param", `{`+connectors+`, configuration.names: config, configuration.params: '{"config": {"scope": "acme", "kind": "all"}}'}`)
	ns.pod("nothing-to-exclude", `{`+connectors+`, configuration.names: "config,!unwnted", `+params+`}`)
	ns.pod("one-not-allowed", fmt.Sprintf(`{connectors: "first,%s/closed", configuration.names: config, %s}`, closed.name,
		params))

	ns.running("pod")
	ns.want("pod", "/volume/registries", "mirror of acme, tags a+b\n"+
		ns.name+"/first is https://first.example.com\n"+
		ns.name+"/third is https://third.example.com\n")
	ns.want("pod", "/volume/sources", other.name+"/second with acme")
	ns.want("pod", "/volume/both", "sources")
	ns.wantFiles("pod", "/volume", "both", "registries", "sources")
	ns.refused("without-param", "code = InvalidArgument", `required configuration param "scope" is missing`)
	ns.refused("wrong-param", "code = InvalidArgument", `configuration param "kind" must be one of [mirror publish], not "all"`)
	ns.refused("nothing-to-exclude", "code = InvalidArgument",
		`configuration.names excludes the file "unwnted", but the volume's files are: both, registries, sources, unwanted`)
	ns.refused("one-not-allowed", "code = PermissionDenied",
		fmt.Sprintf(`ServiceAccount %s/default may not read Connector "%s/closed"`, ns.name, closed.name))
}

// curl uses a forward proxy with nothing but the built-in files.
func TestBuiltInFilesLetCurlThroughTheProxy(t *testing.T) {
	ns := beside(t, "--builtin-files")
	other := newNamespace(t)
	ns.class("curl-one", configurations{"config": {"ca.crt": "of the class"}})
	ns.class("curl-two", nil)
	ns.connector("one", "curl-one", "http://one.example.com")
	other.connector("two", "curl-two", "http://two.example.com")
	proxy := forwardProxy(t, []string{ns.name + "/one", other.name + "/two"},
		func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "the proxy answers for %s", r.URL)
		})
	ns.proxy("connectorclass", "curl-two", proxy)
	ns.allow("default", ns)
	other.allow("default", ns)
	connectors := fmt.Sprintf(`connectors: "one,%s/two"`, other.name)
	ns.pod("pod", `{`+connectors+`, configuration.names: "!context.token"}`)
	ns.pod("with-class", `{`+connectors+`, configuration.names: "config"}`)
	ns.running("pod", "with-class")

	const request = "curl --silent --show-error --fail http://one.example.com/hello"
	for _, way := range []string{
		"set -a; . /volume/.env; set +a; " + request,
		request + " --config /volume/.curlrc",
		request + ` --proxy "$(cat /volume/http.proxy)"`,
		request + ` --proxy "$(cat /volume/https.proxy)"`,
	} {
		if output, err := ns.sh("pod", way); err != nil || output != "the proxy answers for http://one.example.com/hello" {
			t.Errorf("%s: %v: %s", way, err, output)
		}
	}
	if output, err := ns.sh("pod", request+" --proxy "+proxy); err == nil || !strings.Contains(output, "407") {
		t.Errorf("the proxy lets one in without a token: %v: %s", err, output)
	}

	ns.want("pod", "/volume/connector.status.proxyAddress", proxy)
	ns.wantFiles("pod", "/volume", ".curlrc", ".env", "connector.status.proxyAddress", "http.proxy",
		"https.proxy") // there is no CA
	ns.want("with-class", "/volume/ca.crt", "of the class")
	ns.wantTokenOf(ns.read("with-class", "/volume/context.token"), ns.name, "default", "with-class")
}

// documentedGitClasses are those of the product's documentation, by the release that has them first, and what
// git reads from their files. There TOKEN and COLON-TOKEN stand for the token in base64, the latter after a colon.
var documentedGitClasses = []struct{ release, template, config string }{
	{"1.0-ssl", `[http]
  sslVerify = false
`, `http.sslverify=false
`},
	{"1.0", `[http]
    extraHeader = Authorization: Basic {{ printf ":%s" .context.token | b64enc }}
[url "{{ .connector.status.proxyAddress }}"]
    insteadOf = {{.connector.spec.address}}
`, `http.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.6", `[http]
    extraHeader = Authorization: Basic {{ .context.token | b64enc }}
[url "{{ .connector.status.proxyAddress }}"]
    insteadOf = {{ .connector.spec.address }}
`, `http.extraheader=Authorization: Basic TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.9", `[http]
    extraHeader = Authorization: Basic {{ printf ":%s" .context.token | b64enc }}
{{- range .connectors }}
[url "{{ .status.proxyAddress }}"]
    insteadOf = {{.spec.address}}
{{- end }}
`, `http.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
	{"1.4-params", `{{ $sslVerify := "true" -}}
{{- range .connector.spec.params }}{{- if eq .name "sslVerify" }}{{$sslVerify = .value }}{{ end }}{{- end }}
[http]
  sslVerify = {{ $sslVerify }}
`, `http.sslverify=true
`},
	{"1.12", `{{- range .connectors }}
[http "{{ .status.proxy.httpAddress.url }}"]
    extraHeader = Authorization: Basic {{ printf ":%s" $.context.token | b64enc }}
[url "{{ .status.proxy.httpAddress.url }}"]
    insteadOf = {{.spec.address}}
{{- end }}
`, `http.http://proxy.example.com.extraheader=Authorization: Basic COLON-TOKEN
url.http://proxy.example.com.insteadof=https://one.example.com
`},
}

func TestGitReadsTheDocumentedClasses(t *testing.T) {
	ns := beside(t)
	files := map[string]string{"token": "{{ .context.token }}"}
	for _, class := range documentedGitClasses {
		files[class.release] = class.template
	}
	ns.target("documented-git", files)
	ns.proxy("connector", "target", "http://proxy.example.com")
	ns.pod("pod", mountTarget)
	ns.running("pod")
	token := ns.read("pod", "/volume/token")
	encode := base64.StdEncoding.EncodeToString
	for _, class := range documentedGitClasses {
		want := strings.NewReplacer("COLON-TOKEN", encode([]byte(":"+token)), "TOKEN",
			encode([]byte(token))).Replace(class.config)
		if got := ns.kubectl("exec", "pod", "--", "git", "config", "--file", "/volume/"+class.release,
			"--list"); got != want {
			t.Errorf("release %s: git config --list says\n%s\nnot\n%s", class.release, got, want)
		}
	}
}

// The documented classes for yarn, and for JSON, which has a comma too many there for anything but YAML.
const documentedYarn = `
{{- $proxyURL := urlParse .connector.status.proxyAddress -}}
{{- $password := .context.token -}}
{{- $registryURL := urlParse .connector.spec.address -}}
{{- $username := printf "%s/%s" .connector.metadata.namespace .connector.metadata.name | urlquery -}}
npmRegistryServer: "{{ .connector.spec.address }}"
npmAuthIdent: "{{ printf "user:password" | b64enc }}"
unsafeHttpWhitelist:
- {{ $registryURL.hostname }}
httpProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
httpsProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
npmAlwaysAuth: true
enableStrictSsl: false
npmPublishRegistry: "{{ .connector.spec.address }}"
`

const documentedJSON = `{"connectors": [
{{- range .connectors }}
  {"name": "{{ .name }}", "address": "{{ .spec.address }}"},
{{- end }}
]}
`

func TestYAMLParsersReadTheDocumentedClasses(t *testing.T) {
	ns := beside(t)
	ns.target("documented-yaml", map[string]string{"token": "{{ .context.token }}", ".yarnrc.yml": documentedYarn,
		"settings.json": documentedJSON})
	ns.proxy("connector", "target", "http://proxy.example.com")
	ns.pod("pod", mountTarget)
	ns.running("pod")
	const address = "https://one.example.com"
	proxy := fmt.Sprintf("http://%s%%2Ftarget:%s@proxy.example.com", ns.name, ns.read("pod", "/volume/token"))
	for file, want := range sorted(map[string]map[string]any{
		".yarnrc.yml": {
			"npmRegistryServer": address, "npmPublishRegistry": address, "npmAuthIdent": "dXNlcjpwYXNzd29yZA==",
			"unsafeHttpWhitelist": []any{"one.example.com"}, "httpProxy": proxy, "httpsProxy": proxy,
			"npmAlwaysAuth": true, "enableStrictSsl": false,
		},
		"settings.json": {"connectors": []any{map[string]any{"name": "target", "address": address}}},
	}) {
		var got map[string]any
		if err := yaml.UnmarshalStrict([]byte(ns.read("pod", "/volume/"+file)), &got); err != nil ||
			!reflect.DeepEqual(got, want) {
			t.Errorf("%s is %v (%v), not %v", file, got, err, want)
		}
	}
}
