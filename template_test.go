package main

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

// ---- Rendering ----

// rendered publishes a volume of one file, from a Connector with some fields, and returns the file.
func (n *node) rendered(text string, change ...func(object)) (string, error) {
	n.t.Helper()
	spec := object{"connectorClassName": "class", "address": "https://example.com", "number": 3, "big": 12345678901,
		"float": 1.5, "yes": true,
		"null": nil, "nulls": []any{nil}, "list": []any{"a", 1, 2.5}, "empty": "", "map": object{"key": "value"}}
	n.api.put(class("class", configuration("config", "file", text)),
		connector("default", "rendered", "class", append([]func(object){with(spec, "spec")}, change...)...))
	v := n.volume(attrs{"connector.name": "rendered"})
	if err := v.publish(); err != nil {
		v.wantNothing()
		return "", err
	}
	return v.file("file"), v.unpublish()
}

func TestTemplates(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for template, want := range sorted(map[string]string{
		"":                      "",
		"plain\ntext\n":         "plain\ntext\n",
		`{{ "a" -}}   b`:        "ab",
		`{{/* a comment */}}x`:  "x",
		`{{ .connector.kind }}`: "Connector",
		`{{ .connector.metadata.name }}|{{ .connector.name }}|{{ .connector.namespace }}`: "rendered|rendered|default",
		`{{ (index .connectors 0).status.proxyAddress }}`: "http://c-rendered.default" +
			".svc.cluster.local",
		`{{ (index .connector.status.conditions 0).type }}`: "Ready",
		`{{ .context.proxy.caCert }}`:                       "",
		`{{ index .configurations "none" | default "x" }}`:  "x",

		// Numbers are what they were in the object.
		`{{ .connector.spec.number }} {{ .connector.spec.big }} {{ .connector.spec.float }}`: "3 12345678901 1.5",
		`{{ add .connector.spec.number 1 }} {{ eq .connector.spec.number 3 }}`:               "4 true",
		`{{ .connector.spec.list }} {{ toJson .connector.spec.list }}`:                       `[a 1 2.5] ["a",1,2.5]`,
		`{{ printf "%d" .connector.spec.number }}`:                                           "3",

		// Missing values are nothing, as long as they are not printed.
		`{{ if .connector.spec.none }}a{{ else }}b{{ end }}`:                              "b",
		`{{ if .connector.spec.none.of.this }}a{{ end }}`:                                 "",
		`{{ if not .connector.spec.none }}a{{ end }}`:                                     "a",
		`{{ if and .connector.spec.none true }}a{{ end }}`:                                "",
		`{{ if .connector.spec.null }}a{{ else }}b{{ end }}`:                              "b",
		`{{ range .connector.spec.none }}a{{ end }}`:                                      "",
		`{{ range .connector.spec.none }}a{{ else }}b{{ end }}`:                           "b",
		`{{ with .connector.spec.none }}a{{ else }}b{{ end }}`:                            "b",
		`{{ with .connector.spec.none }}a{{ else with .connector.kind }}{{ . }}{{ end }}`: "Connector",
		`{{ default "x" .connector.spec.none }}`:                                          "x",
		`{{ .connector.spec.none.of.this | default "x" }}`:                                "x",
		`{{ .connector.spec.null | default "x" }}`:                                        "x",
		`{{ coalesce .connector.spec.none .connector.spec.empty "x" }}`:                   "x",
		`{{ $x := .connector.spec.none }}{{ $x | default "x" }}`:                          "x",
		`{{ $x := .connector.spec.none }}{{ $x = "y" }}{{ $x }}`:                          "y",
		`{{ hasKey .connector.spec "null" }} {{ empty .connector.spec.none }}`:            "false true",
		`{{ .connector.spec.empty }}`:                                                     "",
		`{{ print "a" 1 }} {{ println "b" }}{{ urlquery "a/b" }} {{ html "<" }} {{ js "'" }} {{ toString 1 }} {{ printf ` +
			`"%s" "c" }}`: "a1 b\na%2Fb &lt; \\' 1 c",

		// sprig
		`{{ "a" | upper | b64enc }} {{ list 1 2 | join "," }} {{ (urlParse "https://h:1/p").hostname }} {{ dict "a" 1 | ` +
			`toJson }}`: `QQ== 1,2 h {"a":1}`,
		`{{ sha256sum "a" | trunc 8 }} {{ splitList "," "a,b" | last }} ` +
			`{{ trimPrefix "/" "/a" }} {{ ternary "y" "n" true }}`: "ca978112 b a y",

		// The renderer reaches no files, and has the time zones all the same.
		`{{ dateInZone "15:04 MST" 1767268800 "Europe/Berlin" }} {{ date "15:04 MST" 1767268800 }}`: "13:00 CET 12:00 UTC",

		// Templates, loops
		`{{ define "t" }}<{{ . }}>{{ end }}{{ template "t" .connector.kind }}` +
			`{{ block "b" 1 }}{{ . }}{{ end }}`: "<Connector>1",
		`{{ range $i, $e := .connector.spec.list }}{{ if eq $i 1 }}{{ continue }}{{ end }}{{ $e }}{{ if eq $i 2 }}{{ break ` +
			`}}{{ end }}{{ end }}`: "a2.5",
		`{{ range 3 }}{{ . }}{{ end }}`: "012",
	}) {
		got, err := n.rendered(template)
		if err != nil || got != want {
			t.Errorf("%s\n\tis %q, not %q (%v)", template, got, want, err)
		}
	}
}

func TestTemplatesThatFail(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	missing := "no value"
	for template, word := range sorted(map[string]string{
		// Arguments that do not fit
		`{{ trimSuffix "a" }}`:   "file line 1: {{ trimSuffix \"a\" }}: trimSuffix takes 2 arguments, not 1",
		`{{ upper "a" "b" }}`:    "upper takes 1 arguments, not 2",
		`{{ printf }}`:           "printf takes 1 arguments or more, not 0",
		`{{ upper .connector }}`: "argument 1 of upper is map[string]interface {}, not string",
		`{{ "x" | repeat "3" }}`: "argument 1 of repeat is string, not int",

		// Printing a missing value
		`{{ .connector.spec.none }}`: "file line 1: {{ .connector.spec.none }} has " +
			"no value",
		"\n\n  {{ .connector.spec.none }}": "file line 3: {{ .connector.spec.none }} has " +
			"no value",
		`{{.connector.spec.null}}`: "file line 1: {{ .connector.spec.null }} has " +
			"no value",
		`{{ .connector.spec.none.of.this }}`: "{{ .connector.spec.none.of.this }} " +
			"has no value",
		`{{ index .connector.spec "none" }}`:                                missing,
		`{{ get .connector.spec "none" | default nil }}`:                    missing,
		`{{ $x := .connector.spec.none }}{{ $x }}`:                          missing,
		`{{ range .connector.spec.nulls }}{{ . }}{{ end }}`:                 missing,
		`{{ if true }}{{ .none }}{{ end }}`:                                 missing,
		`{{ if false }}{{ else }}{{ .none }}{{ end }}`:                      missing,
		`{{ with .connector }}{{ .none }}{{ end }}`:                         missing,
		`{{ with .none }}{{ else }}{{ .none }}{{ end }}`:                    missing,
		`{{ range list 1 }}{{ $.none }}{{ end }}`:                           missing,
		`{{ range .none }}{{ else }}{{ .none }}{{ end }}`:                   missing,
		`{{ define "t" }}{{ .none }}{{ end }}{{ template "t" .connector }}`: missing,
		`{{ template "t" .none }}{{ define "t" }}{{ . }}{{ end }}`:          missing,
		`{{ block "b" .connector }}{{ .none }}{{ end }}`:                    missing,
		`{{ (.connector.spec.none) }}`:                                      missing,
		`{{ print "a" .connector.spec.none }}`:                              "argument 2 of print has no value",
		`{{ printf "%s" .connector.spec.none }}`:                            "argument 2 of printf has no value",
		`{{ println .connector.spec.none }}`:                                " has no value",
		`{{ urlquery .connector.spec.none }}`:                               " has no value",
		`{{ .connector.spec.none | html }}`:                                 " has no value",
		`{{ .connector.spec.none | js }}`:                                   " has no value",
		`{{ .connector.spec.none | toString }}`:                             " has no value",
		`{{ .connector.spec.none | b64enc }}`:                               " has no value",
		`{{ urlParse .connector.spec.none }}`:                               " has no value",

		// What would give away the driver's environment or network, and what the guards use
		`{{ env "NODE_NAME" }}`:           `"env" not defined`,
		`{{ expandenv "$NODE_NAME" }}`:    `"expandenv" not defined`,
		`{{ getHostByName "localhost" }}`: `"getHostByName" not defined`,
		`{{ timeLeft }}`:                  `"timeLeft" not defined`,

		// Other failures
		`{{ required "x" .none }}`:        `"required" not defined`,
		`{{ fail "on purpose" }}`:         `file line 1: {{ fail "on purpose" }}: on purpose`,
		`{{ template "none" }}`:           `"none" not defined`,
		`{{ .connector.spec.address.x }}`: "can't evaluate field x",
		`{{ index .connectors 1 }}`:       "out of range",
		`{{ end }}`:                       "unexpected {{end}}",
	}) {
		got, err := n.rendered(template)
		if got != "" {
			t.Errorf("%s\n\tis %q", template, got)
		}
		wantError(t, err, codes.FailedPrecondition, `ConnectorClass "class", configuration "config": file line `, word)
		if text := err.Error(); strings.Contains(text, checkFunction) || strings.Contains(text, "executing") ||
			strings.Contains(text, "error calling") {
			t.Errorf("not in plain words: %v", err)
		}
	}
}

// The driver's log and its errors are searched for secrets in every test; here templates try to get them there.
func TestTemplatesThatWantToTellTheToken(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for _, template := range []string{
		`{{ fail .context.token }}`,
		`{{ fail (b64enc .context.token) }}`,
		`{{ fail (printf ":%s" .context.token | b64enc) }}`,
		`{{ fail (trunc 300 .context.token) }}`,
		`{{ fail (substr 10 60 .context.token) }}`,
		`{{ fail (toJson .context) }}`,
		`{{ fail (printf "%v" .context) }}`,
		`{{ .context.token.x }}`,
		`{{ index .context.token "x" }}`,
		`{{ index .connectors .context.token }}`,
		`{{ index .connector .context.token }}`,
		`{{ mustToDate "2006" .context.token | date "2006" }}`,
		`{{ mustRegexMatch (print "(" .context.token) "x" }}`,
		`{{ mustFromJson .context.token }}`,
		`{{ template "x" .context.token }}{{ define "x" }}{{ .y }}{{ end }}`,
		`{{ slice .context.token 1 100000 }}`,
		`{{ call .context.token }}`,
		`{{ len 3 .context.token }}`,
		`{{ semver .context.token }}`,
		`{{ genSelfSignedCert .context.token (list .context.token) nil 1 }}`,
		`{{ buildCustomCert .context.token .context.token }}`,
		`{{ decryptAES .context.token .context.token }}`,
		`{{ atoi .context.token }}`,
		`{{ int .context.token }}`,
		`{{ b64dec .context.token }}`,
		`{{ b32dec .context.token }}`,
		`{{ htpasswd .context.token .context.token }}`,
		`{{ bcrypt .context.token }}`,
		`{{ genPrivateKey .context.token }}`,
		`{{ derivePassword 1 .context.token .context.token "a" "b" }}`,
		`{{ date "2006" .context.token }}`,
		`{{ duration .context.token }}`,
		`{{ durationRound .context.token }}`,
		`{{ dateInZone "2006" now .context.token }}`,
		`{{ fromJson .context.token }}`,
		`{{ printf "%d" .context.token }}`,
		`{{ printf .context.token 1 }}`,
		`{{ toJson (dict "a" (list .context.token .none)) }}`,
		`{{ toJson (dict .context.token .none) }}`,
		`{{ dig .context.token "a" "b" .context.token }}`,
		`{{ if hasPrefix "TOKEN" .context.token }}{{ else }}{{ fail .context.token }}{{ end }}`,
	} {
		if got, err := n.rendered(template); err == nil {
			t.Errorf("%s\n\tis %q", template, got)
		}
	}
	// These do not fail, and are files.
	for _, template := range []string{`{{ len .context.token }}`, `{{ b64enc .context.token | b64dec | len }}`,
		`{{ .context }}`} {
		if _, err := n.rendered(template); err != nil {
			t.Error(err)
		}
	}
	if _, err := n.rendered("{{ .connector.metadata.annotations.mark }}{{ .connector.none }}"); err == nil {
		t.Error("half a file was published")
	}
}

func TestOutputLimit(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	if got, err := n.rendered(`{{ repeat 1048576 "x" }}`); err != nil || len(got) != 1<<20 {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for _, template := range []string{`{{ repeat 1048576 "x" }}y`, `{{ range 2000000 }}x{{ end }}`} {
		_, err := n.rendered(template)
		wantError(t, err, codes.FailedPrecondition, "a volume may hold 1024 KiB in 256 files")
	}
	// A file that replaces another one counts once.
	n.api.put(class("git", configuration("one", "a", `{{ repeat 1048576 "x" }}`),
		configuration("two", "a", `{{ repeat 1048576 "y" }}`)))
	v := n.volume(attrs{"configuration.names": "one,two"})
	v.mustPublish()
	v.want("a", strings.Repeat("y", 1<<20))
}

// Other files and other volumes share the objects, and sprig has functions that change their arguments.
func TestTemplatesCannotChangeWhatOthersSee(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	change := `{{ $_ := set .connector.spec "address" "changed" }}{{ $_ := set .context "token" "changed" }}{{ $_ := ` +
		`unset .connector.metadata "name" }}` +
		`{{ $_ := set .configurations "p" "changed" }}{{ $_ := set (index .connector.spec.list 0) "x" "changed" }}{{ ` +
		`.connector.spec.address }}`
	see := `{{ .connector.spec.address }} {{ .connector.metadata.name }} {{ .configurations.p }} {{ (index ` +
		`.connector.spec.list 0).x }}`
	n.api.put(gitClassOf("a", change, "b", see),
		connector("default", "git", "git", with([]any{object{"x": "kept"}}, "spec", "list")))
	v, w := n.volume(attrs{"configuration.params": `{"config":{"p":"kept"}}`}),
		n.volume(attrs{"configuration.params": `{"config":{"p":"kept"}}`})
	for range 2 {
		for _, v := range []*podVolume{v, w} {
			v.pod.renewToken() // so that the files are made again, from the cache
			v.mustPublish()
			v.want("a", "changed")
			v.want("b", "https://git.example.com git kept kept")
		}
	}
}

func TestFileNames(t *testing.T) {
	t.Parallel()
	for name, ok := range sorted(map[string]bool{
		"a": true, ".a": true, "a.b": true, "a..b": true, "-": true, "_": true, "A-z_0.9": true, ".env": true, "...": false,
		strings.Repeat("a", 253): true,
		"":                       false, ".": false, "..": false, "..a": false, "..data": false, "a/b": false, "/a": false,
		"a\\b": false,
		"a b":  false, "a\n": false, "é": false,
		"a\x00": false, "a:b": false, strings.Repeat("a", 254): false,
	}) {
		if err := checkFileName(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
	n := startNode(t)
	for _, name := range []string{"..data", "..gen-x", "a/b", "a b", ""} {
		n.api.put(gitClassOf("ok", "x", name, "x"))
		n.volume().mustRefuse(codes.FailedPrecondition, fmt.Sprintf("file name %q is not allowed", name))
	}
}

// ---- The documented ConnectorClasses: what they make is read by the rules of its format ----

// parseGitConfig reads git-config(1): sections, subsections in quotes, keys; a key's values by
// "section.subsection.key".
func parseGitConfig(t *testing.T, text string) map[string][]string {
	t.Helper()
	header := regexp.MustCompile(`^\[([-.a-zA-Z0-9]+)(?: "((?:[^"\\]|\\.)*)")?\]$`)
	key := regexp.MustCompile(`^([a-zA-Z][-a-zA-Z0-9]*) *= *(.*)$`)
	values, section := map[string][]string{}, ""
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if match := header.FindStringSubmatch(line); match != nil {
			section = match[1] + "." + match[2]
		} else if match := key.FindStringSubmatch(line); match != nil && section != "" {
			values[section+"."+match[1]] = append(values[section+"."+match[1]], match[2])
		} else if line != "" && line[0] != '#' && line[0] != ';' {
			t.Errorf("not a line of a git configuration: %q", line)
		}
	}
	return values
}

func basic(text string) string {
	return "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte(text))
}

func TestDocumentedGitClasses(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	const one, two = "http://c-git.default.svc.cluster.local", "http://c-other.team-a.svc.cluster.local"
	for what, c := range sorted(map[string]struct {
		file string
		want func(token string) map[string][]string
		both bool // also with two Connectors
	}{
		"1.0": {"[http]\n  sslVerify = false\n",
			func(string) map[string][]string { return map[string][]string{"http..sslVerify": {"false"}} }, false},
		"1.0 to 1.8": {"[http]\n    extraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n" +
			"[url \"{{ .connector.status.proxyAddress }}\"]\n    insteadOf = {{.connector.spec.address}}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(":" + token)}, "url." + one +
					".insteadOf": {"https://git.example.com"}}
			}, false},
		"1.9": {"[http]\n    extraHeader = Authorization: Basic {{ printf \":%s\" .context.token | b64enc }}\n{{- range " +
			".connectors }}\n" +
			"[url \"{{ .status.proxyAddress }}\"]\n    insteadOf = {{.spec.address}}\n{{- end }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(":" + token)}, "url." + one +
					".insteadOf": {"https://git.example.com"},
					"url." + two + ".insteadOf": {"https://other.example.com"}}
			}, true},
		"a parameter of the Connector": {"{{ $sslVerify := \"true\" -}}\n{{- range .connector.spec.params }}{{- if eq " +
			".name \"sslVerify\" }}{{$sslVerify = .value }}{{ end }}{{- end }}\n" +
			"[http]\n  sslVerify = {{ $sslVerify }}\n",
			func(string) map[string][]string { return map[string][]string{"http..sslVerify": {"true"}} }, false},
		"1.6, without colon": {"[http]\n    extraHeader = Authorization: Basic {{ .context.token | b64enc }}\n[url \"{{ " +
			".connector.status.proxyAddress }}\"]\n    insteadOf = {{ .connector.spec.address }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http..extraHeader": {basic(token)}, "url." + one +
					".insteadOf": {"https://git.example.com"}}
			}, false},
		"1.12": {"{{- range .connectors }}\n[http \"{{ .status.proxy.httpAddress.url }}\"]\n    extraHeader = " +
			"Authorization: Basic {{ printf \":%s\" $.context.token | b64enc }}\n" +
			"[url \"{{ .status.proxy.httpAddress.url }}\"]\n    insteadOf = {{.spec.address}}\n{{- end }}\n",
			func(token string) map[string][]string {
				return map[string][]string{"http." + one + ".extraHeader": {basic(":" + token)}, "url." + one +
					".insteadOf": {"https://git.example.com"},
					"http." + two + ".extraHeader": {basic(":" + token)}, "url." + two + ".insteadOf": {"https://other.example.com"}}
			}, true},
	}) {
		t.Run(what, func(t *testing.T) {
			n.api.put(gitClassOf(".gitconfig", c.file), connector("team-a", "other", "git"))
			v := n.volume()
			v.mustPublish()
			want := c.want(v.pod.token)
			if c.both {
				w := n.volume(attrs{"connector.name": "-", "connectors": "git, team-a/other"})
				w.mustPublish()
				if got, want := parseGitConfig(t, w.file(".gitconfig")),
					c.want(w.pod.token); !maps.EqualFunc(got, want, slices.Equal) {
					t.Errorf("two Connectors: %v, not %v", got, want)
				}
				maps.DeleteFunc(want, func(key string, _ []string) bool { return strings.Contains(key, two) })
			}
			if got := parseGitConfig(t, v.file(".gitconfig")); !maps.EqualFunc(got, want, slices.Equal) {
				t.Errorf("%v, not %v", got, want)
			}
		})
	}
	n.api.put(gitClassOf(".gitconfig", "this is git config\n"), connector("default", "git", "git", with(nil, "status")))
	v := n.volume() // the quick start: no proxy at all
	v.mustPublish()
	v.want(".gitconfig", "this is git config\n")

	n.api.put(gitClassOf(".gitconfig", "{{ range .connector.spec.params }}{{ .name }}={{ .value }}{{ end }}"),
		connector("default", "git", "git", with([]any{object{"name": "sslVerify", "value": "false"}}, "spec", "params")))
	v = n.volume()
	v.mustPublish()
	v.want(".gitconfig", "sslVerify=false")
}

const npmHead = `{{- $proxyURL := urlParse .connector.status.proxyAddress -}}
{{- $password := .context.token -}}
{{- $registryURL := urlParse .connector.spec.address -}}
{{- $username := printf "%s/%s" .connector.metadata.namespace .connector.metadata.name | urlquery -}}
`

const npmrc = npmHead + `# NPM Registry Configuration
registry={{ trimSuffix "/" .connector.spec.address }}/

# The authentication token is fake, because the connector will not use it, it will be used for proxy requests.
//{{ $registryURL.host }}/{{ trimSuffix "/" (trimPrefix "/" $registryURL.path) }}/:_auth={{ printf "user:password" | b64enc }}

# Set the connector proxy URL for npm registry access
https-proxy={{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}
proxy={{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}

# Disable strict SSL verification for internal registries
strict-ssl=false

# Disable npm audit to avoid security warnings during CI/CD
audit=false

# Disable funding messages to reduce output noise
fund=false
`

const yarnrc = npmHead + `# Set the NPM registry server URL for package resolution
npmRegistryServer: "{{ .connector.spec.address }}"

# The authentication token is fake, because the connector will not use it, it will be used for proxy requests.
npmAuthIdent: "{{ printf "user:password" | b64enc }}"

# The unsafeHttpWhitelist is used to whitelist the host for proxy requests.
unsafeHttpWhitelist:
- {{ $registryURL.hostname }}

# authentication for proxy requests
httpProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"
httpsProxy: "{{ $proxyURL.scheme }}://{{ $username }}:{{ $password }}@{{ $proxyURL.host }}"

# Always authenticate to the registry
npmAlwaysAuth: true

# Disable strict SSL verification for internal registries
enableStrictSsl: false

# Set the registry URL for package publishing
npmPublishRegistry: "{{ .connector.spec.address }}"
`

// parseLines reads key and value of every line that is not empty or a comment.
func parseLines(t *testing.T, text string, line *regexp.Regexp) map[string]string {
	t.Helper()
	values := map[string]string{}
	for l := range strings.Lines(text) {
		l = strings.TrimSuffix(l, "\n")
		if match := line.FindStringSubmatch(l); match != nil {
			values[match[1]] = match[2]
		} else if l != "" && l[0] != '#' && l[0] != ';' {
			t.Errorf("a line that %v does not match: %q", line, l)
		}
	}
	return values
}

func TestDocumentedNPMClass(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(class("npm", configuration("npmrc", "ca.cert", "{{ .context.proxy.caCert }}", ".npmrc", npmrc),
		configuration("yarnrc", "ca.cert", "{{ .context.proxy.caCert }}", ".yarnrc.yml", yarnrc)),
		connector("default", "npm", "npm", with("https://nexus.example.com:8443/repository/npm/", "spec", "address"),
			with(certificate("the CA"), "status", "proxy", "httpAddress", "CACerts")))
	v := n.volume(attrs{"connector.name": "npm", "configuration.names": "npmrc, yarnrc"})
	v.mustPublish()
	v.wantFiles(".npmrc", ".yarnrc.yml", "ca.cert")
	v.want("ca.cert", certificate("the CA"))
	proxy := "http://default%2Fnpm:" + v.pod.token + "@c-npm.default.svc.cluster.local"
	if u, err := url.Parse(proxy); err != nil || u.User.Username() != "default/npm" {
		t.Fatal(err)
	}

	ini := parseLines(t, v.file(".npmrc"), regexp.MustCompile(`^([^#;=\[\]]+)=(.*)$`))
	if want := (map[string]string{
		"registry": "https://nexus.example.com:8443/repository/npm/",
		"//nexus.example.com:8443/repository/npm/:_auth": "dXNlcjpwYXNzd29yZA==",
		"https-proxy": proxy, "proxy": proxy, "strict-ssl": "false", "audit": "false", "fund": "false",
	}); !maps.Equal(ini, want) {
		t.Errorf(".npmrc is %v, not %v", ini, want)
	}

	yaml := parseLines(t, v.file(".yarnrc.yml"), regexp.MustCompile(`^(?:- )?([a-zA-Z.]+):? ?"?([^"]*)"?$`))
	if want := (map[string]string{
		"npmRegistryServer":  "https://nexus.example.com:8443/repository/npm/",
		"npmPublishRegistry": "https://nexus.example.com:8443/repository/npm/",
		"npmAuthIdent":       "dXNlcjpwYXNzd29yZA==", "unsafeHttpWhitelist": "", "nexus.example.com": "", "httpProxy": proxy,
		"httpsProxy":    proxy,
		"npmAlwaysAuth": "true", "enableStrictSsl": "false",
	}); !maps.Equal(yaml, want) {
		t.Errorf(".yarnrc.yml is %v, not %v", yaml, want)
	}
}

func TestDocumentedClassesForSeveralConnectors(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	lines := "{{- range .connectors }}\n# Configuration for Connector: {{ .name }}\nparam_name = {{ .name " +
		"}}\nparam_value = {{ .spec.address }}\n{{- end }}\n"
	n.api.put(class("multi-connector", configuration("config", ".multi-connector-config", lines)),
		connector("default", "a", "multi-connector"), connector("team-a", "b", "multi-connector"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "a,team-a/b"})
	v.mustPublish()
	v.want(".multi-connector-config",
		"\n# Configuration for Connector: a\nparam_name = a\nparam_value = https://a.example.com"+
			"\n# Configuration for Connector: b\nparam_name = b\nparam_value = https://b.example.com\n")

	n.api.put(class("connector-a", configuration("config-a", "config.xml", lines)),
		class("connector-b", configuration("config-b", "settings.json",
			"{\"connectors\": [\n{{- range .connectors }}\n  {\"name\": \"{{ .name }}\", \"address\": \"{{ .spec.address "+
				"}}\"},\n{{- end }}\n]}\n")),
		connector("default", "a", "connector-a"), connector("team-a", "b", "connector-b"))
	v = n.volume(attrs{"connector.name": "-", "connectors": "a,team-a/b", "configuration.names": "config-a,config-b"})
	v.mustPublish()
	v.want("config.xml", "\n# Configuration for Connector: a\nparam_name = a\nparam_value = https://a.example.com\n")
	v.want("settings.json", "{\"connectors\": [\n  {\"name\": \"b\", \"address\": \"https://b.example.com\"},\n]}\n")
}
