package main

import (
	"encoding/json"
	"strings"
	"testing"
)

// The API server itself refuses addresses that would write more into a file than an address, as deploy.yaml tells it.
func TestAddressesOfOneWordOnly(t *testing.T) {
	ns := begin(t)
	ns.target("words", map[string]string{"address": "{{ .connector.spec.address }}"})
	const allowed = "!#%&()*+,-./0123456789:;=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz~"
	fields := []struct {
		kind, object, subresource string
		path                      []string
	}{
		{"connector", "target", "", []string{"spec", "address"}},
		{"connector", "target", "", []string{"spec", "addressExtensions", "value"}},
		{"connector", "target", "status", []string{"status", "proxyAddress"}},
		{"connector", "target", "status", []string{"status", "proxy", "httpAddress", "url"}},
		{"connectorclass", "words", "status", []string{"status", "proxyAddress"}},
		{"connectorclass", "words", "status", []string{"status", "proxy", "httpAddress", "url"}},
	}
	for _, f := range fields {
		set := func(value any) error {
			patch := value
			for i := len(f.path) - 1; i >= 0; i-- {
				patch = map[string]any{f.path[i]: patch}
				if f.path[i] == "value" {
					patch = []any{map[string]any{"name": "more", "value": value}}
				}
			}
			text, err := json.Marshal(patch)
			if err != nil {
				t.Fatal(err)
			}
			_, err = kubectl("--namespace", ns.name, "patch", f.kind, f.object, "--subresource="+f.subresource,
				"--type=merge", "--dry-run=server", "--patch", string(text))
			return err
		}
		for _, address := range []string{"", allowed, "https://user@[2001:db8::1]:8443/a%20b/~c;d=(e)?f=g&h=i#j", "https://xn--r8jz45g.example.com/%C3%A9"} {
			if err := set(address); err != nil {
				t.Errorf("%s %v: %v", f.kind, f.path, err)
			}
		}
		for _, part := range append(strings.Split("\"'`\\$<>{}|^ \t\n\r\x00\x1b\x7f", ""),
			"\u0085", "\u00a0", "\u00e9", "\u200b", "\u202e", "\u2028", "\u3164", "\u0430", "\ufeff", "\U000e0041") {
			err := set("https://one.example.com/" + part)
			if err == nil || !strings.Contains(err.Error(), "is invalid") || !strings.Contains(err.Error(), f.path[len(f.path)-1]+" in body should match") {
				t.Errorf("%s %v with %q: %v", f.kind, f.path, part, err)
			}
		}
	}
	// An extension need not be a string.
	ns.kubectl("patch", "connector", "target", "--type=merge", "--dry-run=server",
		"--patch", `{"spec": {"addressExtensions": [{"name": "object", "value": {"a": "b c"}}, {"name": "number", "value": 1}]}}`)
}
