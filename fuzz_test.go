package main

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// ---- Random input ----

func FuzzAttributes(f *testing.F) {
	f.Add("git", "default", "", "config", "", "30m", "", "")
	f.Add("", "", "a,team-a/b", "one, two,!file", `{"one":{"p":"v"}}`, "1h30m", "csi.storage.k8s.io/ephemeral", "true")
	f.Add("../x", "a%2fb", ",,/", "!", "null", "1ns", "configuration.name", "x")
	f.Add("a.b", "-", "a//b", " , ", `{"":{}}`, "9223372036854775807ns", "", "\x00")
	f.Add("git", "", "", "config", "", "", "file.mode", "0600")
	f.Add("git", "", "", "config", "", "", "file.owner", "1000")
	f.Fuzz(func(t *testing.T, name, namespace, connectors, configurations, params, expiration, key, value string) {
		dns := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
		for _, builtIn := range []bool{false, true} {
			sent := attrs{"connector.name": name, "connector.namespace": namespace, "connectors": connectors,
				"configuration.names":  configurations,
				"configuration.params": params, "token.expiration": expiration, key: value}
			a, err := parseAttributes(sent, "default", builtIn)
			if err == nil {
				err = a.check()
			}
			if err != nil {
				if len(err.Error()) > 2000 {
					t.Errorf("the message has %d bytes", len(err.Error()))
				}
				continue
			}
			if len(a.connectors) == 0 || len(a.selection.Configurations) == 0 && !builtIn || len(a.connectors) > 32 ||
				len(a.selection.Configurations) > 64 || len(a.selection.Excluded) > 64 {
				t.Errorf("accepted: %+v", a)
			}
			if a.lifetime < 10*time.Minute || a.lifetime > 24*time.Hour || a.lifetime == 3607*time.Second ||
				a.lifetime%time.Second != 0 {
				t.Errorf("accepted: %v", a.lifetime)
			}
			if a.mode&^0o666 != 0 || a.mode != 0 && a.mode&0o444 == 0 || a.owner < 0 || a.owner > 1<<31-1 {
				t.Errorf("accepted: %o and %d", a.mode, a.owner)
			}
			for _, r := range a.connectors {
				if !dns.MatchString(r.name) || !dns.MatchString(r.namespace) || len(r.name) > 253 || len(r.namespace) > 63 ||
					strings.Contains(r.namespace, ".") {
					t.Errorf("accepted: %q", r)
				}
			}
			for i, c := range a.selection.Configurations {
				if len(c) > 253 || slices.Contains(a.selection.Configurations[:i], c) {
					t.Errorf("accepted: %q", a.selection.Configurations)
				}
				if c == "" || c != strings.TrimSpace(c) || strings.ContainsAny(c[:1], "!") || strings.Contains(c, ",") {
					t.Errorf("accepted: %q", c)
				}
			}
			for c, text := range a.selection.Params {
				if value, err := decodeJSON(text); !slices.Contains(a.selection.Configurations, c) || err != nil ||
					kindOf(value) != "object" {
					t.Errorf("params of %q: %s", c, text)
				}
			}
		}
	})
}

func FuzzFileName(f *testing.F) {
	for _, name := range []string{"a", ".gitconfig", "..data", ".", "..", "a/b", "a\x00", "ü", strings.Repeat("a", 254)} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if checkFileName(name) != nil {
			return
		}
		if name != filepath.Base(name) || name == "." || strings.HasPrefix(name, "..") || len(name) > 253 ||
			!filepath.IsLocal(name) ||
			strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' || r == '\\' }) {
			t.Errorf("accepted: %q", name)
		}
	})
}

func FuzzRender(f *testing.F) {
	for _, text := range []string{
		"plain", "{{ .connector.spec.address }}", "{{ .context.token }}", "{{ fail .context.token }}",
		"{{ range .connectors }}{{ .x }}{{ end }}", "{{ print .none }}",
		"{{ define \"a\" }}{{ . }}{{ end }}{{ template \"a\" .connector.spec }}",
		"{{ with $x := .connector.spec.list }}{{ index $x 0 | toJson }}{{ else }}{{ . }}{{ end }}",
		"{{ .connector.spec.none | default .context | toString | b64enc }}",
		"{{ if and .a (or .b .connector) }}{{ get .connector \"x\" }}{{ end }}", npmrc,
	} {
		f.Add(text, `{"spec":{"address":"https://example.com","list":[1,null,{"a":1.5}]}}`)
	}
	f.Add("{{ .connector.spec }}", `{"spec":"no value","metadata":[],"status":{"proxy":1}}`)
	// Functions that are slow, whose result may be as long as a number says, or that can make a value hold itself: only a
	// renderer survives those.
	slow := regexp.MustCompile(`(?i)[0-9]{4}|0x|[0-9]e|gen[A-Z]|rand|bcrypt|htpasswd|derive|repeat|until|seq|indent|` +
		`printf|wrap|AES|set|merge`)
	token := issue("default", "default", nil, time.Hour, apiAudience)
	f.Fuzz(func(t *testing.T, text, data string) {
		value, err := decodeJSON([]byte(data))
		o, ok := value.(object)
		if err != nil || !ok || slow.MatchString(text) || strings.Contains(text+data, "no value") {
			return
		}
		mounted := []mountedConnector{{o, class("class", configuration("config", "file", text))}}
		before, _ := json.Marshal(o)
		for _, builtIn := range []bool{false, true} {
			files, err := render(mounted, selection{Configurations: []string{"config"}, BuiltIn: builtIn}, token,
				func(string) {})
			if err != nil {
				if secret := secretIn(err.Error()); secret != "" {
					t.Errorf("the error contains %s", secret)
				}
				continue
			}
			size := 0
			for name, content := range files {
				size += len(content)
				if checkFileName(name) != nil || strings.Contains(string(content), "<no value>") {
					t.Errorf("%s: %q", name, content)
				}
			}
			if size > 1<<20 || len(files) > 256 {
				t.Errorf("%d files of %d bytes", len(files), size)
			}
		}
		if after, _ := json.Marshal(o); !bytes.Equal(before, after) {
			t.Errorf("the object was changed: %s", after)
		}
	})
}

// What the driver reads of an object is what templates see of it.
func FuzzParseObject(f *testing.F) {
	for _, o := range []object{connector("team-a", "git", "git"), gitClass(),
		connector("a", "b", "c", with("http://x", "status", "proxy", "httpAddress", "audience")), {}} {
		text, _ := json.Marshal(o)
		f.Add(string(text))
	}
	f.Add(" {\n\"metadata\" : {\"n\\u0061me\" : \"a\\\"\\u00e4\\\\\" ,\t\"uid\":\"\\\\\"} , \"spec\":{ \"x\" : [ 1 , " +
		"-2.5e3 , true,null,{ } , [ ] ], \"connectorClassName\":\"git\" } }\r\n")
	f.Add(`{"metadata":{"name":["x"],"uid":{"name":"y"}},"Metadata":{"name":"z"},` +
		`"spec":[{"connectorClassName":"a"}],"status":{"proxy":"x","PROXY":{}}}`)
	f.Fuzz(func(t *testing.T, text string) {
		value, err := decodeJSON([]byte(text))
		decoded, ok := value.(object)
		if err != nil || !ok {
			if _, err := parseObject([]byte(text)); err == nil && value != nil {
				t.Errorf("%s is taken for an object", text)
			}
			return
		}
		raw, err := json.Marshal(decoded) // each name once, as the API server sends it
		if err != nil {
			return // a number that no float holds
		}
		o, err := parseObject(raw)
		must(t, err)
		if want := contentVersion(stringAt(decoded, "metadata", "uid"),
			stringAt(decoded, "metadata", "resourceVersion")); o.version != want {
			t.Errorf("%s: the version is %q, not %q", raw, o.version, want)
		}
		for _, field := range []struct {
			got  string
			path []string
		}{
			{o.namespace, []string{"metadata", "namespace"}}, {o.name, []string{"metadata", "name"}},
			{o.class, []string{"spec", "connectorClassName"}},
			{o.classAudience, []string{"spec", "proxy", "audience"}}, {o.proxyAddress, []string{"status", "proxyAddress"}},
			{o.proxyURL, []string{"status", "proxy", "httpAddress", "url"}},
			{o.proxyAudience, []string{"status", "proxy", "httpAddress", "audience"}},
		} {
			if want := stringAt(decoded, field.path...); field.got != want {
				t.Errorf("%s: %v is %q, not %q", raw, field.path, field.got, want)
			}
		}
	})
}

func FuzzBundles(f *testing.F) {
	a, b := certificate("a"), certificate("b")
	for _, bundle := range []string{a + b, "\ufeff# a\r\n" + strings.ReplaceAll(a, "\n", "\r\n"),
		strings.ReplaceAll(b, "CERT", "X509 CERT"), a[:90], strings.TrimSpace(a) + b,
		strings.ReplaceAll(a, " CERT", " TRUSTED CERT"), "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n",
		"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----"} {
		f.Add(bundle)
	}
	f.Fuzz(func(t *testing.T, bundle string) {
		o := connector("default", "git", "git", with(bundle, "status", "proxy", "httpAddress", "CACerts"))
		kept := func() string { return stringAt(o, "status", "proxy", "httpAddress", "CACerts") }
		if err := keepCertificates("x", o); err != nil {
			if len(err.Error()) > 500 || kept() != bundle {
				t.Errorf("%v: %q", err, kept())
			}
			return
		}
		// As many as there were, and nothing else.
		again, count := "", 0
		for block, rest := pem.Decode([]byte(kept())); block != nil; block, rest = pem.Decode(rest) {
			again += string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: block.Bytes}))
			count++
		}
		if begun := strings.Count(strings.NewReplacer("\ufeff", "", "\r", "\n").Replace(bundle),
			"-----BEGIN"); count != begun || again != kept() {
			t.Errorf("%d of %d certificates in %q", count, begun, kept())
		}
		once := kept()
		if err := keepCertificates("x", o); err != nil || kept() != once {
			t.Errorf("at the second time: %v, %q", err, kept())
		}
	})
}
