package tests

import (
	"context"
	"encoding/json"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/types"

	"connectors-csi/e2e/image"
)

// The API server itself refuses addresses that would write more into a file than an address, as deploy.yaml tells it.
func TestAddressesOfOneWordOnly(t *testing.T) {
	ns := beside(t)
	ns.target("words", map[string]string{"address": "{{ .connector.spec.address }}"})
	const allowed = "!#%&()*+,-./0123456789:;=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]_abcdefghijklmnopqrstuvwxyz~"
	connectors, client := "namespaces/"+ns.name+"/connectors", admin(t).RESTClient()
	fields := []struct {
		kind, object, subresource string
		path                      []string
	}{
		{connectors, "target", "", []string{"spec", "address"}},
		{connectors, "target", "", []string{"spec", "addressExtensions", "value"}},
		{connectors, "target", "status", []string{"status", "proxyAddress"}},
		{connectors, "target", "status", []string{"status", "proxy", "httpAddress", "url"}},
		{"connectorclasses", "words", "status", []string{"status", "proxyAddress"}},
		{"connectorclasses", "words", "status", []string{"status", "proxy", "httpAddress", "url"}},
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
			path := path.Join("/apis/connectors.alauda.io/v1alpha1", f.kind, f.object, f.subresource)
			return client.Patch(types.MergePatchType).AbsPath(path).Param("dryRun",
				"All").Body(text).Do(context.Background()).Error()
		}
		for _, address := range []string{"", allowed, "https://user@[2001:db8::1]:8443/a%20b/~c;d=(e)?f=g&h=i#j",
			"https://xn--r8jz45g.example.com/%C3%A9"} {
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

// OpenSSL and Java judge what becomes of a bundle of certificates: what the driver makes of it they read whole, and what
// it refuses one of them refuses as well, or drops a certificate of.
func TestToolsReadWhatBecomesOfBundles(t *testing.T) {
	dir := t.TempDir()
	if err := image.BuildDriver("..", dir+"/connectors-csi", runtime.GOARCH, "test"); err != nil {
		t.Fatal(err)
	}
	sh := func(stdin, script string) (string, error) {
		cmd := exec.Command("bash", "-euo", "pipefail", "-c", script)
		cmd.Dir, cmd.Stdin = dir, strings.NewReader(stdin)
		output, err := cmd.CombinedOutput()
		return string(output), err
	}
	must := func(output string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err, output)
		}
		return output
	}
	certificate := func(name, options string) string {
		return must(sh("", "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -noenc -keyout "+name+".key -subj /CN="+name+
			" -out "+name+".pem "+options+" 2> /dev/null; cat "+name+".pem"))
	}
	a, b, c := certificate("a", ""), certificate("b", ""), certificate("c", "-set_serial -5") // which Go's x509 refuses
	trusted, key := must(sh("", "openssl x509 -in b.pem -trustout -addtrust serverAuth")), must(sh("", "cat b.key"))
	request := must(sh("", "openssl req -new -key b.key -subj /CN=b"))
	lines := strings.SplitAfter(b, "\n")
	first, body, last := lines[0], strings.Join(lines[1:len(lines)-2], ""), lines[len(lines)-2]
	wide := func(of string) string { return strings.ReplaceAll(of, "\n", "\r\n") }
	label := func(of, label string) string { return strings.ReplaceAll(of, "CERTIFICATE", label) }

	read := func(program, file string) (subjects string, err error) {
		output, err := sh("", map[string]string{
			"openssl": "openssl crl2pkcs7 -nocrl -certfile " + file + " | openssl pkcs7 -print_certs",
			"keytool": "keytool -printcert -file " + file,
		}[program])
		for _, match := range regexp.MustCompile(`(?m)^(?:subject=|Owner: )CN ?= ?(.)$`).FindAllStringSubmatch(output, -1) {
			subjects += match[1]
		}
		return subjects, err
	}
	for what, bundle := range sorted(map[string]struct {
		text string
		kept bool
	}{
		"as they are":               {a + b + c, true},
		"comments":                  {"# one\n" + a + "Subject: CN = b\n" + b + "\nthree - c\n" + c, true},
		"CRLF":                      {wide(a + b + c), true},
		"a byte order mark":         {"\ufeff" + a + b + c, true},
		"X509 CERTIFICATE":          {a + label(b, "X509 CERTIFICATE") + c, true},
		"TRUSTED CERTIFICATE":       {a + trusted + c, true},
		"no newline at the end":     {strings.TrimSuffix(a+b+c, "\n"), true},
		"blanks after each line":    {strings.ReplaceAll(a+b+c, "\n", " \n"), true},
		"no newline between":        {a + strings.TrimSuffix(b, "\n") + c, false},
		"indented":                  {a + "  " + strings.ReplaceAll(b, "\n", "\n  ") + "\n" + c, false},
		"cut off":                   {a + b[:200] + "\n" + c, false},
		"the last one cut off":      {a + b + c[:200], false},
		"a line is missing":         {a + first + strings.Join(lines[2:], "") + c, false},
		"no base64":                 {a + first + "!!!!\n" + body + last + c, false},
		"padding within":            {a + first + "AA==\n" + body + last + c, false},
		"a comment within":          {a + first + "# x\n" + body + last + c, false},
		"NUL within":                {a + first + "\x00\n" + body + last + c, false},
		"headers":                   {a + first + "X: y\n\n" + body + last + c, false},
		"nested":                    {a + first + c + body + last, false},
		"empty":                     {a + first + last + c, false},
		"its end is on its line":    {a + first + strings.TrimSuffix(body, "\n") + last + c, false},
		"its end has another label": {a + first + body + label(last, "X509 CERTIFICATE") + c, false},
		"four dashes":               {a + b[1:] + c, false},
		"six dashes":                {a + "-" + b + c, false},
		"lower case":                {a + label(b, "certificate") + c, false},
		"a label with a blank":      {a + label(b, "CERTIFICATE ") + c, false},
		"a request":                 {a + request + c, false},
		"a private key":             {a + key + c, false},
		"a request, labelled wrong": {a + strings.ReplaceAll(request, " REQUEST", "") + c, false},
	}) {
		objects, err := json.Marshal(map[string]any{"kind": "List", "items": []any{
			map[string]any{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "ConnectorClass", "metadata": map[string]any{"name": "c"}, "spec": map[string]any{
				"configurations": []any{map[string]any{"name": "ca", "data": map[string]any{"ca": "{{ .context.proxy.caCert }}"}}}}},
			map[string]any{"apiVersion": "connectors.alauda.io/v1alpha1", "kind": "Connector", "metadata": map[string]any{"name": "c", "namespace": "c"},
				"spec":   map[string]any{"connectorClassName": "c"},
				"status": map[string]any{"proxy": map[string]any{"httpAddress": map[string]any{"CACerts": bundle.text}}}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		output, err := sh(string(objects), "./connectors-csi render --configuration.names ca > made")
		if (err == nil) != bundle.kept || !bundle.kept && !strings.Contains(output, "CACerts") {
			t.Errorf("%s: %v, %s", what, err, output)
			continue
		}
		must(sh(bundle.text, "cat > bundle"))
		complaints := 0
		for _, program := range []string{"openssl", "keytool"} {
			if bundle.kept {
				if subjects, err := read(program, "made"); subjects != "abc" || err != nil {
					t.Errorf("%s: %s reads %q, %v", what, program, subjects, err)
				}
			} else if subjects, err := read(program, "bundle"); subjects != "abc" || err != nil {
				complaints++
			}
		}
		if !bundle.kept && complaints == 0 {
			t.Errorf("%s: OpenSSL and Java read %s", what, filepath.Join(dir, "bundle"))
		}
	}
}

// Two teams whose ServiceAccounts have the same name do what the messages tell them, and a cluster without the CRDs
// learns that it lacks them.
func TestRemediesOfMessagesWork(t *testing.T) {
	ns := begin(t)
	ns.target("remedies", map[string]string{"address": "{{ .connector.spec.address }}"})
	allow := regexp.MustCompile(`Allow it with: kubectl (create rolebinding \S+ --namespace=\S+ --clusterrole=\S+ --serviceaccount=\S+)`)
	for _, team := range []namespace{newNamespace(t), newNamespace(t)} {
		team.pod("pod", `{connector.name: target, connector.namespace: `+ns.name+`, configuration.names: config}`)
		command := allow.FindStringSubmatch(team.refused("pod", "code = PermissionDenied", "may not read Connector"))
		if command == nil {
			t.Fatal("the message has no command")
		}
		ns.kubectl(strings.Fields(command[1])...)
		team.running("pod")
	}

	for kind, name := range sorted(map[string]string{"Connector": "connectors", "ConnectorClass": "connectorclasses"}) {
		crd := "crd/" + name + ".connectors.alauda.io"
		ns.kubectl("delete", crd)
		ns.pod(name, mountTarget)
		ns.refused(name, "code = FailedPrecondition", kind+` "`, "cannot be read: the cluster has no CRD "+name+".connectors.alauda.io: apply the whole of deploy.yaml")
		installDriver(t)
		ns.kubectl("wait", "--for=condition=Established", crd)
		ns.class("remedies", configurations{"config": {"address": "{{ .connector.spec.address }}"}})
		ns.connector("target", "remedies", "https://one.example.com")
		ns.running(name)
	}
}
