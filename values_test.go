package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What a Connector's author can write into other people's files, and what is said of values that do not fit.

// addressPatterns returns the patterns that deploy.yaml has the API server hold addresses against.
func addressPatterns(t *testing.T) []*regexp.Regexp {
	t.Helper()
	text, err := os.ReadFile("deploy.yaml")
	must(t, err)
	var patterns []*regexp.Regexp
	for _, match := range regexp.MustCompile(`(?m)^ +pattern: '(.*)'$`).FindAllStringSubmatch(string(text), -1) {
		patterns = append(patterns, regexp.MustCompile(match[1])) // as the API server does
	}
	if len(patterns) != 6 { // spec.address, spec.addressExtensions, and two in each status
		t.Fatalf("deploy.yaml has %d patterns", len(patterns))
	}
	return patterns
}

// The API server refuses what the driver refuses, of all characters that there are.
func TestPatternsOfAddressesAreTheDrivers(t *testing.T) {
	t.Parallel()
	patterns := map[string]*regexp.Regexp{}
	for _, pattern := range addressPatterns(t) {
		patterns[pattern.String()] = pattern
	}
	const refused = "\"'`\\$<>{}|^" // of what is printed in ASCII
	for r := rune(0); r <= utf8.MaxRune; r++ {
		address := "a" + string(r) + "b" // of a surrogate U+FFFD, as a decoder of JSON makes of it
		want := r > ' ' && r < 0x7f && !strings.ContainsRune(refused, r)
		if got := checkAddress("", "", address) == nil; got != want {
			t.Errorf("%U: the driver says %v, not %v", r, got, want)
		}
		for _, pattern := range patterns {
			if got := pattern.MatchString(address); got != want {
				t.Errorf("%U: pattern %s says %v, not %v", r, pattern, got, want)
			}
		}
	}
	for _, address := range []string{"", "a", "\n", "a\n", "\na", "a\n\n", "a\nb", "\xff", "a\xe2\x80",
		"\ufeffa", "a\u0301"} {
		for _, pattern := range patterns {
			if driver, server := checkAddress("", "", address) == nil, pattern.MatchString(address); driver != server {
				t.Errorf("%q: the driver says %v, and pattern %s %v", address, driver, pattern, server)
			}
		}
	}
}

// Characters that start commands and variables, end elements, or cannot be told from others.
func TestCharactersOfAddresses(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	const rule = ", but an address is ASCII without white space, control characters, quotes and any of " +
		"\\ ` $ < > { } | ^: "
	for part, message := range sorted(map[string]string{
		"$(id)":                    `'$' at position 11` + rule + `remove it, or write it as %24`,
		"${AWS_SECRET_ACCESS_KEY}": `'$' at position 11` + rule + `remove it, or write it as %24`,
		"a{b":                      `'{' at position 12` + rule + `remove it, or write it as %7B`,
		"a}b":                      `'}' at position 12` + rule + `remove it, or write it as %7D`,
		"</url><id>x</id>":         `'<' at position 11` + rule + `remove it, or write it as %3C`,
		">/dev/null":               `'>' at position 11` + rule + `remove it, or write it as %3E`,
		"|id":                      `'|' at position 11` + rule + `remove it, or write it as %7C`,
		"^":                        `'^' at position 11` + rule + `remove it, or write it as %5E`,
		"`id`":                     "'`' at position 11" + rule + `remove it, or write it as %60`,
		"%5C\\":                    `'\\' at position 14` + rule + `remove it, or write it as %5C`,
		"'":                        `'\'' at position 11` + rule + `remove it, or write it as %27`,
		" ":                        `' ' at position 11` + rule + `remove it, or write it as %20`,
		"\n":                       `'\n' at position 11` + rule + `remove it, or write it as %0A`,
		"\x7f":                     `'\x7f' at position 11` + rule + `remove it, or write it as %7F`,
		"\u200b": `U+200B at position 11` + rule +
			`remove it, or write it as %E2%80%8B, in a host name as xn--…`,
		"\u202e": `U+202E at position 11` + rule,
		"\u2066": `U+2066 at position 11` + rule,
		"\u3164": `U+3164 at position 11` + rule, // Hangul filler
		"\uffa0": `U+FFA0 at position 11` + rule,
		"\u00ad": `U+00AD at position 11` + rule,
		// Cyrillic
		"\u0430pple": `U+0430 at position 11` + rule +
			`remove it, or write it as %D0%B0, in a host name as xn--…`,
		"\u2024":                        `U+2024 at position 11` + rule,
		"\uff0f":                        `U+FF0F at position 11` + rule,
		"\ufe0f":                        `U+FE0F at position 11` + rule,
		"\U000e0041":                    `U+E0041 at position 11` + rule, // a tag
		"\ufeff":                        `U+FEFF at position 11` + rule,
		"例え":                            `U+4F8B at position 11` + rule,
		"\U0010ffff":                    `U+10FFFF at position 11` + rule,
		strings.Repeat("a", 5000) + "|": `'|' at position 5011` + rule,
	}) {
		n.api.put(connector("default", "git", "git", with("https://x/"+part, "spec", "address")))
		n.volume(attrs{"configuration.names": "first"}).
			mustRefuse(codes.FailedPrecondition, `Connector "default/git": spec.address holds `+message)
	}
	// What addresses have that exist: query strings, JDBC, IPv6, percent-encoding.
	n.api.put(gitClassOf("file", "{{ .connector.spec.address }}"))
	for _, address := range []string{"jdbc:oracle:thin:@//db.example.com:1521/x", "git@example.com:a/~b.git",
		"jdbc:sqlserver://db;databaseName=a,b;user=(c)", "https://u:p@[fd00::1%25eth0]:8443/%7Bx%7D/?a=b&c=*!#d",
		"oci+ssh://host_1/a+b", "xn--r8jz45g.example.com"} {
		n.api.put(connector("default", "git", "git", with(address, "spec", "address")))
		v := n.volume()
		v.mustPublish()
		v.want("file", address)
	}
}

// publishBundle publishes a volume of a Connector with these CACerts, and returns what templates see of them.
func (n *node) publishBundle(bundle string) (string, error) {
	n.t.Helper()
	const template = "{{ .context.proxy.caCert }}|{{ .connector.status.proxy.httpAddress.CACerts }}"
	n.api.put(gitClassOf("ca", template),
		connector("default", "git", "git", with(bundle, "status", "proxy", "httpAddress", "CACerts")))
	v := n.volume()
	if err := v.publish(); err != nil {
		v.wantNothing()
		return "", err
	}
	one, other, _ := strings.Cut(v.file("ca"), "|")
	if one != other {
		n.t.Errorf("templates see %q and %q", one, other)
	}
	return one, v.unpublish()
}

// A bundle of certificates may have lines between them that say what they are, or something else.
func TestBundlesThatAreKept(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	a, b, c := certificate("a"), certificate("b"), certificate("c")
	labelled := func(label string) string { return strings.ReplaceAll(b, " CERTIFICATE-", " "+label+" CERTIFICATE-") }
	der, _ := pem.Decode([]byte(b))
	const forServers = "\x30\x0c\x30\x0a\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01" // openssl x509 -addtrust serverAuth
	trusted := string(pem.EncodeToMemory(&pem.Block{Type: "TRUSTED CERTIFICATE", Bytes: append(der.Bytes, forServers...)}))
	lines := strings.SplitAfter(b, "\n")
	first, body, last := lines[0], lines[1:len(lines)-2], lines[len(lines)-2]
	for what, bundle := range sorted(map[string]string{
		"as they are":            a + b + c,
		"without a last newline": strings.TrimSuffix(a+b+c, "\n"),
		"CRLF":                   strings.ReplaceAll(a+b+c, "\n", "\r\n"),
		"CR":                     strings.ReplaceAll(a+b+c, "\n", "\r"),
		"CR twice":               strings.ReplaceAll(a+b+c, "\n", "\r\r\n"),
		"a byte order mark":      "\ufeff" + a + b + c,
		"a mark before each":     "\ufeff" + a + "\ufeff" + b + "\ufeff" + c,
		"comments": "# evil\n" + a + "[core]\n\tfsmonitor = id\n\n" + b + "Subject: CN = c - d\n==\n" + c +
			"evil",
		"lines of dashes":          "-----\n" + a + "---- b ----\n" + b + "-----------------\n" + c,
		"NUL between":              a + "\x00\n" + b + c + "\x00",
		"X509 CERTIFICATE":         a + labelled("X509") + c,
		"TRUSTED CERTIFICATE":      a + trusted + c,
		"TRUSTED, with no trailer": a + labelled("TRUSTED") + c,
		"blanks after each line":   strings.ReplaceAll(a+b+c, "\n", " \t\n"),
		"blank lines":              strings.ReplaceAll(a+b+c, "\n", "\n\n"),
		"indented base64":          a + first + "  " + strings.Join(body, "\t") + last + c,
		"one long line":            a + first + strings.ReplaceAll(strings.Join(body, ""), "\n", "") + "\n" + last + c,
	}) {
		if got, err := n.publishBundle(bundle); got != a+b+c {
			t.Errorf("%s: %v, %q", what, err, got)
		}
	}
	if got, err := n.publishBundle(a + a + b + a); got != a+a+b+a {
		t.Errorf("the same several times: %v, %q", err, got)
	}
	many := strings.Repeat("# "+strings.Repeat("x", 800)+"\n"+a, 1000)
	if got, err := n.publishBundle(many); got != strings.Repeat(a, 1000) {
		t.Errorf("%d bytes: %v, %d bytes", len(many), err, len(got))
	}
}

// Where one certificate cannot be kept, somebody hears of it before TLS fails.
func TestBundlesThatAreRefused(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	a, b, c := certificate("a"), certificate("b"), certificate("c")
	lines := strings.SplitAfter(b, "\n")
	first, body, last := lines[0], strings.Join(lines[1:len(lines)-2], ""), lines[len(lines)-2]
	label := func(label string) string { return strings.ReplaceAll(b, "CERTIFICATE", label) }
	block := func(label string, der ...byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: label, Bytes: der}))
	}
	decoded, _ := pem.Decode([]byte(b))
	der := slices.Clip(decoded.Bytes)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(t, err)
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), NextUpdate: time.Now(), RevokedCertificateEntries: []x509.RevocationListEntry{
			{SerialNumber: big.NewInt(1), RevocationTime: time.Now()}},
	}, &x509.Certificate{KeyUsage: x509.KeyUsageCRLSign, SubjectKeyId: []byte("key")}, key)
	must(t, err)

	const newline = "a newline is missing before its -----BEGIN, or it is indented"
	const noBlock = "it is not base64 between a line -----BEGIN CERTIFICATE----- and its -----END"
	const damaged = "it is damaged, or something else than one certificate"
	labelled := func(label string) string { return fmt.Sprintf("it is labelled %q, not CERTIFICATE", label) }
	for what, c := range sorted(map[string]struct{ bundle, number, message string }{
		"no newline between":        {a + strings.TrimSuffix(b, "\n") + c, "3 of 3", newline},
		"a space between":           {strings.TrimSuffix(a, "\n") + " " + b + c, "2 of 3", newline},
		"a line separator between":  {a + strings.TrimSuffix(b, "\n") + "\u2028" + c, "2 of 3", noBlock},
		"indented":                  {a + "  " + strings.ReplaceAll(b, "\n", "\n  ") + "\n" + c, "2 of 3", newline},
		"quoted":                    {a + "> " + strings.ReplaceAll(b, "\n", "\n> ") + "\n" + c, "2 of 3", newline},
		"six dashes":                {a + "-" + b + c, "2 of 3", newline},
		"named in a comment":        {a + "# a copy of -----BEGIN CERTIFICATE-----\n" + c, "2 of 3", newline},
		"cut off":                   {a + b[:100] + "\n" + c, "2 of 3", noBlock},
		"its end is indented":       {a + first + body + " " + last + c, "2 of 3", noBlock},
		"its end is on its line":    {a + first + strings.TrimSuffix(body, "\n") + last + c, "2 of 3", noBlock},
		"its end has more":          {a + strings.TrimSuffix(b, "\n") + " x\n" + c, "2 of 3", noBlock},
		"its end has another label": {a + first + body + "-----END X509 CERTIFICATE-----\n" + c, "2 of 3", noBlock},
		"nested":                    {a + first + c + body + last, "2 of 3", noBlock},
		"nothing but beginnings":    {strings.Repeat(first, 40000), "1 of 40000", noBlock},
		"no base64":                 {a + first + "!" + body + last + c, "2 of 3", noBlock},
		"a comment within":          {a + first + "# x\n" + body + last + c, "2 of 3", noBlock},
		"NUL within":                {a + first + "\x00" + body + last + c, "2 of 3", noBlock},
		"padding within":            {a + first + "AA==\n" + body + last + c, "2 of 3", noBlock},
		"no padding":                {a + first + body + "A\n" + last + c, "2 of 3", noBlock},
		"base64 for URLs":           {a + first + "_-_-" + body + last + c, "2 of 3", noBlock},
		"headers":                   {a + first + "Proc-Type: 4,ENCRYPTED\n\n" + body + last + c, "2 of 3", noBlock},
		"a line is missing":         {a + first + strings.Join(lines[2:], "") + c, "2 of 3", damaged},
		"empty":                     {a + first + last + c, "2 of 3", damaged},
		"text":                      {a + block("CERTIFICATE", []byte("hello")...) + c, "2 of 3", damaged},
		"cut off within the base64": {a + block("CERTIFICATE", der[:len(der)-3]...) + c, "2 of 3", damaged},
		"more than a certificate":   {a + block("CERTIFICATE", append(der, 0, 0)...) + c, "2 of 3", damaged},
		"two in one":                {a + block("CERTIFICATE", append(der, der...)...) + c, "2 of 3", damaged},
		"a request, labelled wrong": {a + block("CERTIFICATE", request...) + c, "2 of 3", damaged},
		"a key, labelled wrong":     {a + block("CERTIFICATE", pkcs8...) + c, "2 of 3", damaged},
		"a list, labelled wrong":    {a + block("CERTIFICATE", list...) + c, "2 of 3", damaged},
		"a request": {a + block("CERTIFICATE REQUEST", request...) + c, "2 of 3",
			labelled("CERTIFICATE REQUEST")},
		"a private key":             {block("PRIVATE KEY", pkcs8...) + a, "1 of 2", labelled("PRIVATE KEY")},
		"a private key on one line": {a + "-----BEGIN PRIVATE KEY-----MIGH" + c, "2 of 3", noBlock},
		"a revocation list":         {a + block("X509 CRL", list...) + c, "2 of 3", labelled("X509 CRL")},
		"a bag":                     {a + block("PKCS7", 0x30, 0) + c, "2 of 3", labelled("PKCS7")},
		"lower case":                {a + label("certificate") + c, "2 of 3", labelled("certificate")},
		"a label with a blank":      {a + label("CERTIFICATE ") + c, "2 of 3", labelled("CERTIFICATE ")},
		"no label":                  {a + "-----BEGIN-----\n" + c, "2 of 3", noBlock},
		"four dashes at the end":    {a + strings.Replace(b, "E-----\n", "E----\n", 1) + c, "2 of 3", noBlock},
		"more behind its beginning": {a + strings.Replace(b, "E-----\n", "E----- x\n", 1) + c, "2 of 3", noBlock},
		"a long label":              {a + "-----BEGIN " + strings.Repeat("x", 100000), "2 of 2", noBlock},
		"four dashes":               {a + b[1:] + c, "", "has an -----END without a -----BEGIN"},
		"the beginning is missing":  {strings.Join(lines[1:], "") + a, "", "has an -----END without a -----BEGIN"},
		"a comment":                 {"evil", "", "holds no certificate in PEM format"},
		"a byte order mark":         {"\ufeff", "", "holds no certificate in PEM format"},
		"DER":                       {string(der), "", "holds no certificate in PEM format"},
	}) {
		message := `Connector "default/git": status.proxy.httpAddress.CACerts`
		if c.number != "" {
			message += ", certificate " + c.number + ":"
		}
		_, err := n.publishBundle(c.bundle)
		wantError(t, err, codes.FailedPrecondition, message+" "+c.message)
		if err != nil && strings.Contains(err.Error(), "MIGH") {
			t.Errorf("%s: the key is in the message", what)
		}
	}
	git := gitClass()
	with(a[:100], "status", "proxy", "httpAddress", "CACerts")(git)
	n.api.put(git, connector("default", "git", "git"))
	n.volume().mustRefuse(codes.FailedPrecondition,
		`ConnectorClass "git": status.proxy.httpAddress.CACerts, certificate 1 of 1: `+noBlock)
}

// Whether the operator is to be waited for depends on what fails, not on the words of the template.
func TestHintOfAProxyThatIsNotThereYet(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	const hint = "Connector default/git has no proxy address yet (status.proxy.httpAddress.url): wait for the "
	noStatus, noURL := with(nil, "status"), with(nil, "status", "proxy", "httpAddress", "url")
	for template, fails := range sorted(map[string]bool{
		`{{ .connector.status.proxyAddress }}`:                                       true,
		`{{ .connector.status.proxy.httpAddress.url }}`:                              true,
		`{{ .connector.status.proxyAddress | b64enc }}`:                              true,
		`{{ (urlParse .connector.status.proxyAddress).host }}`:                       true,
		`{{ $u := .connector.status.proxyAddress }}{{ urlParse $u }}`:                true,
		`{{ range .connectors }}{{ .status.proxyAddress }}{{ end }}`:                 true,
		`{{ if not .connector.status.proxyAddress }}{{ fail "too early" }}{{ end }}`: true,
		// one after the other
		`{{ .connector.status.proxyAddress }}{{ .connector.spec.typo }}`: true,
		"# for the proxy\n{{ .connector.spec.typo }}":                    false,
		`{{/* the proxy */}}{{ .connector.spec.proxyTypo }}`:             false,
		`{{ .connector.spec.typo }}{{ .connector.status.proxyAddress }}`: false,
		`{{ .connectorclass.proxyAddress }}`:                             false,
		`{{ fail "no proxy" }}`:                                          false,
		`{{ proxy }}`:                                                    false,
		`{{ if .connector.status.proxyAddress }}proxy{{ else }}{{ .connector.spec.typo }}{{ end }}{{ x }}`: false,
	}) {
		for _, change := range []func(object){noStatus, noURL} {
			n.api.put(gitClassOf("http.proxy", template))
			n.api.put(connector("default", "git", "git", change))
			err := n.volume().publish()
			if status.Code(err) != codes.FailedPrecondition || strings.Contains(err.Error(), hint) != fails {
				t.Errorf("%s: %v", template, err)
			}
		}
		n.api.put(connector("default", "git", "git"))
		if err := n.volume().publish(); err != nil && strings.Contains(err.Error(), "no proxy address") {
			t.Errorf("%s, with a proxy: %v", template, err)
		}
	}
	// Of several Connectors, it is the one that has none.
	n.api.put(gitClassOf("a", "{{ range .connectors }}{{ .status.proxyAddress }}{{ end }}"),
		connector("default", "one", "git"), connector("default", "two", "git", noStatus))
	n.volume(attrs{"connector.name": "-", "connectors": "one,two"}).
		mustRefuse(codes.FailedPrecondition, "{{ .status.proxyAddress }} has no value; Connector default/two has no proxy")
}

// The types of JSON schema. Values of the others that classes declare could never be given.
func TestTypesOfParams(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	values := map[string]string{"string": `"s"`, "integer": "8080", "number": "1.5", "boolean": "true", "array": `["a"]`,
		"object": `{"a":1}`}
	for kind := range sorted(values) {
		declared := configuration("config", "file", "{{ .configurations.p }}")
		declared["params"] = []any{param("p", "type", kind)}
		n.api.put(class("git", declared))
		for of, value := range sorted(values) {
			v := n.volume(attrs{"configuration.params": `{"config":{"p":` + value + `}}`})
			if of == kind || kind == "number" && of == "integer" {
				v.mustPublish()
				v.want("file", strings.NewReplacer(`"`, "", "{", "map[", "}", "]").Replace(value))
				continue
			}
			v.mustRefuse(codes.InvalidArgument, fmt.Sprintf(`configuration param "p" must be of type %s, not %s`, kind, of))
		}
	}
	for value, kind := range sorted(map[string]string{"0": "integer", "-1": "integer", "9223372036854775807": "integer",
		"1.0": "number", "1e3": "number", "-0.5": "number", "false": "boolean"}) {
		declared := configuration("config", "file", "{{ .configurations.p }}")
		declared["params"] = []any{param("p", "type", kind)}
		n.api.put(class("git", declared))
		n.volume(attrs{"configuration.params": `{"config":{"p":` + value + `}}`}).mustPublish()
	}

	// A type that there is not is the class's fault, and only of those who mount that configuration.
	for _, kind := range []string{"bool", "int", "float", "String", "null", "any", " string", strings.Repeat("x", 300)} {
		declared := configuration("config", "file", "x")
		declared["params"] = []any{param("p", "type", kind, "default", "d")}
		n.api.put(class("git", declared, configuration("first", "one", "1")))
		message := fmt.Sprintf(`ConnectorClass "git", configuration "config": param "p" is declared with the type %q; `+
			`there are string, integer, number, boolean, array, object`, cut(kind, maxQuotedBytes))
		n.volume().mustRefuse(codes.FailedPrecondition, message)
		n.volume(attrs{"configuration.params": `{"config":{"p":true}}`}).mustRefuse(codes.FailedPrecondition, message)
		n.volume(attrs{"configuration.names": "first"}).mustPublish()
	}
	// Values of an enum are what they print as.
	declared := configuration("config", "file", "{{ .configurations.p }}")
	declared["params"] = []any{param("p", "type", "integer", "enum", []any{"80", "443"})}
	n.api.put(class("git", declared))
	v := n.volume(attrs{"configuration.params": `{"config":{"p":443}}`})
	v.mustPublish()
	v.want("file", "443")
	n.volume(attrs{"configuration.params": `{"config":{"p":81}}`}).
		mustRefuse(codes.InvalidArgument, `configuration param "p" must be one of [80 443], not "81"`)
}

// What a message tells somebody to do has to work.
func TestRemediesOfMessages(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	// Two ServiceAccounts of one name are bound by two RoleBindings, whatever their namespaces' names are.
	names, command := map[string]string{},
		regexp.MustCompile(`kubectl create rolebinding (\S+-connectors) --namespace=default `)
	for _, reader := range []string{"team-a/b", "team/b", "team/a-b", "team/a.b", "team-a/default", "team-a-b/default",
		"team-a/b-default", "team-a/b.default"} {
		n.api.forbid(reader, connectorPath("default", "git"))
		err := n.pod(reader).volume("config", attrs{"connector.namespace": "default"}).publish()
		name := command.FindStringSubmatch(err.Error())
		if name == nil || names[name[1]] != "" {
			t.Fatalf("%s, as %s: %v", reader, names[name[1]], err)
		}
		names[name[1]] = reader
	}

	// An API server without the CRDs says so without a Status.
	const nothing = "404 page not found\n"
	n.api.answer("/connectors/", 404, nothing, "Content-Type", "text/plain; charset=utf-8")
	n.volume().mustRefuse(codes.FailedPrecondition, `Connector "default/git" cannot be read: `,
		"the cluster has no CRD connectors.connectors.alauda.io: apply the whole of deploy.yaml")
	n.api.answer("/connectorclasses/", 404, nothing)
	n.volume().mustRefuse(codes.FailedPrecondition, `ConnectorClass "git" of Connector "default/git" cannot be read: `,
		"the cluster has no CRD connectorclasses.connectors.alauda.io: apply the whole of deploy.yaml")
	n.api.answer("/token", 404, nothing)
	n.volume(attrs{"token.expiration": "1h"}).
		mustRefuse(codes.NotFound, "no token of 1h0m0s for ServiceAccount default/default: Not Found (HTTP 404")
	n.api.answer("", 0, "")

	n.volume(attrs{"configuration.names": "-"}).mustRefuse(codes.InvalidArgument, "configuration.names is missing",
		"it may be left out only where the driver runs with --builtin-files")
}
