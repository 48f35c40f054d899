package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/big"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"text/template/parse"
	"time"
	_ "time/tzdata" // a renderer reaches no files
	"unicode"
	"unicode/utf8"
	"unsafe"

	"github.com/Masterminds/sprig/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// object is an object of the Kubernetes API as decodeJSON returns it.
type object = map[string]any

// mountedConnector is one of the Connectors that a volume mounts, with its class.
type mountedConnector struct {
	connector, class object
}

// mountedClass is one of their classes, with the Connectors of that class, in their order.
type mountedClass struct {
	class      object
	connectors []object
}

// selection is what a Pod wants of its Connectors' classes.
type selection struct {
	Configurations []string                   // by name; files of later ones replace files of earlier ones
	Excluded       []string                   // file names
	Params         map[string]json.RawMessage // by configuration; objects
	BuiltIn        bool                       // the built-in files too
}

// podError makes an error that whoever wrote the Pod can repair. Every other error of render is one of a
// ConnectorClass or a Connector.
func podError(err error) error { return failure{codes.InvalidArgument, err} }

// render makes the files of a volume. The order decides which of two files of the same name stays:
//
//  1. the built-in files, where they are wanted
//  2. the configurations in the order of the selection; one that several classes have is rendered once for
//     each class, in the order in which the Connectors name the classes, with the Connectors of that class
//  3. the exclusions
//
// It runs in the renderer, and says by announce what it is about to do, in case it does not return. No error
// it returns contains the token.
func render(mounted []mountedConnector, want selection, token string,
	announce func(step string)) (files, error) {
	for _, m := range mounted {
		connector, class := fmt.Sprintf("Connector %q", fullName(m.connector)),
			fmt.Sprintf("ConnectorClass %q", nameOf(m.class))
		err := cmp.Or(checkAddresses(connector, m.connector), checkAddresses(class, m.class),
			keepCertificates(connector, m.connector), keepCertificates(class, m.class))
		if err != nil {
			return nil, err
		}
	}
	out := &volumeFiles{files: files{}}
	classes := groupByClass(mounted)

	// 1. built-in files
	if want.BuiltIn {
		if err := renderBuiltIn(out, mounted, classes[len(classes)-1], token); err != nil {
			return nil, err
		}
	}

	// 2. configurations
	for _, name := range want.Configurations {
		if err := renderConfigurations(out, classes, name, want.Params[name], token, announce); err != nil {
			return nil, err
		}
	}

	// 3. exclusions
	for _, name := range want.Excluded {
		if _, ok := out.files[name]; !ok {
			return nil, podError(fmt.Errorf("configuration.names excludes the file %q, but the volume's "+
				"files are: %s", cut(name, maxQuotedBytes),
				strings.Join(slices.Sorted(maps.Keys(out.files)), ", ")))
		}
	}
	for _, name := range want.Excluded {
		delete(out.files, name)
	}
	return out.files, nil
}

// checkAddresses refuses addresses that are more than an address where a class puts them, since whoever
// writes a Connector may not write other people's configuration.
func checkAddresses(of string, o object) error {
	for _, path := range [][]string{{"spec", "address"}, {"status", "proxyAddress"},
		{"status", "proxy", "httpAddress", "url"}} {
		if err := checkAddress(of, strings.Join(path, "."), stringAt(o, path...)); err != nil {
			return err
		}
	}
	for _, extension := range objectList(o, "spec", "addressExtensions") {
		if err := checkAddress(of, "spec.addressExtensions", stringAt(extension, "value")); err != nil {
			return err
		}
	}
	return nil
}

// checkAddress refuses what an address cannot hold, or what a shell, a format or a reader's eye takes for
// something else; the CRDs in deploy.yaml have the same rule.
func checkAddress(of, field, address string) error {
	i := strings.IndexFunc(address, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune("\"'`\\$<>{}|^", r)
	})
	if i < 0 {
		return nil
	}
	bad, _ := utf8.DecodeRuneInString(address[i:])
	name, host := strconv.QuoteRune(bad), ""
	if bad > unicode.MaxASCII {
		name, host = fmt.Sprintf("%U", bad), ", in a host name as xn--…"
	}
	return fmt.Errorf("%s: %s holds %s at position %d, but an address is ASCII without white space, control "+
		"characters, quotes and any of \\ ` $ < > { } | ^: remove it, or write it as %%%s%s", of, field,
		name, i+1, strings.ReplaceAll(fmt.Sprintf("% X", string(bad)), " ", "%"), host)
}

// keepCertificates replaces status.proxy.httpAddress.CACerts by the certificates in it, encoded anew: bundles
// have lines of comment between them, which would reach files. Where one cannot be kept, the volume is refused:
// a file that lacks a certificate fails much later, in TLS.
func keepCertificates(of string, o object) error {
	address, _ := valueAt(o, "status", "proxy", "httpAddress").(object)
	bundle := stringAt(address, "CACerts")
	if bundle == "" {
		return nil
	}
	var certificates []byte
	bundle = strings.NewReplacer("\ufeff", "", "\r", "\n").Replace("\n" + bundle)
	parts := strings.Split(bundle, pemBegin)
	for i, part := range parts[1:] {
		der, err := readCertificate(part)
		if !strings.HasSuffix(parts[i], "\n") {
			err = errors.New("a newline is missing before its -----BEGIN, or it is indented")
		}
		if err != nil {
			return fmt.Errorf("%s: status.proxy.httpAddress.CACerts, certificate %d of %d: %w", of, i+1,
				len(parts)-1, err)
		}
		block := &pem.Block{Type: "CERTIFICATE", Bytes: der}
		certificates = append(certificates, pem.EncodeToMemory(block)...)
	}
	switch {
	case strings.Count(bundle, "-----END") != len(parts)-1:
		return fmt.Errorf("%s: status.proxy.httpAddress.CACerts has an -----END without a -----BEGIN", of)
	case certificates == nil:
		return fmt.Errorf("%s: status.proxy.httpAddress.CACerts holds no certificate in PEM format", of)
	}
	address["CACerts"] = string(certificates)
	return nil
}

const pemBegin = "-----BEGIN"

// certificateFields are those of RFC 5280, section 4.1, by which a certificate is told from other things.
type certificateFields struct {
	Content struct {
		Version                   int `asn1:"optional,explicit,tag:0"`
		Serial, Algorithm, Issuer asn1.RawValue
		Validity                  struct{ NotBefore, NotAfter asn1.RawValue }
		Subject, PublicKey        asn1.RawValue
	}
	Algorithm asn1.RawValue
	Signature asn1.BitString
}

// readCertificate returns the certificate of a PEM block, whose text it has from after the -----BEGIN on, as
// DER. Whether it is a valid one is left to those who use it: crypto/x509 refuses some that OpenSSL takes.
func readCertificate(text string) ([]byte, error) {
	block, _ := pem.Decode([]byte(pemBegin + text))
	if block == nil || len(block.Headers) > 0 {
		return nil, errors.New("it is not base64 between a line -----BEGIN CERTIFICATE----- and its -----END")
	}
	if !slices.Contains([]string{"CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"}, block.Type) {
		return nil, fmt.Errorf("it is labelled %q, not CERTIFICATE", cut(block.Type, maxQuotedBytes))
	}
	trailer, err := asn1.Unmarshal(block.Bytes, &certificateFields{})
	// OpenSSL's trusted certificates are followed by what they are trusted for.
	if err != nil || len(trailer) > 0 && block.Type != "TRUSTED CERTIFICATE" {
		return nil, errors.New("it is damaged, or something else than one certificate")
	}
	return block.Bytes[:len(block.Bytes)-len(trailer)], nil
}

// groupByClass groups the Connectors by class, keeping the order in which each class came first.
func groupByClass(mounted []mountedConnector) []mountedClass {
	var classes []mountedClass
	for _, m := range mounted {
		i := slices.IndexFunc(classes,
			func(c mountedClass) bool { return nameOf(c.class) == nameOf(m.class) })
		if i < 0 {
			i = len(classes)
			classes = append(classes, mountedClass{class: m.class})
		}
		classes[i].connectors = append(classes[i].connectors, m.connector)
	}
	return classes
}

// renderConfigurations renders the configurations of that name in all classes; the CRD does not forbid two in
// one class.
func renderConfigurations(out *volumeFiles, classes []mountedClass, name string, params json.RawMessage,
	token string, announce func(step string)) error {
	var known []string
	found := false
	for _, c := range classes {
		where := fmt.Sprintf("ConnectorClass %q, configuration %q", nameOf(c.class), name)
		step := func(file string) { announce(fmt.Sprintf("%s, file %q: rendering it", where, file)) }
		var others []string
		for _, configuration := range objectList(c.class, "spec", "configurations") {
			if other := stringAt(configuration, "name"); other != name {
				others = append(others, other)
				continue
			}
			found = true
			if err := renderConfiguration(out, c, configuration, params, token, step); err != nil {
				return fmt.Errorf("%s: %w", where, err)
			}
		}
		known = append(known, fmt.Sprintf("ConnectorClass %q has: %s", nameOf(c.class),
			cmp.Or(strings.Join(others, ", "), "none")))
	}
	if !found {
		return podError(fmt.Errorf("configuration %q of configuration.names does not exist; %s",
			cut(name, maxQuotedBytes), strings.Join(known, "; ")))
	}
	return nil
}

// renderConfiguration renders the files of one configuration of the class.
func renderConfiguration(out *volumeFiles, c mountedClass, configuration object, supplied json.RawMessage,
	token string, announce func(file string)) error {
	value, err := decodeParams([]byte(cmp.Or(string(supplied), "{}")))
	if err != nil {
		return podError(fmt.Errorf("configuration.params: %w", err))
	}
	given, _ := value.(object)
	params, err := resolveParams(objectList(configuration, "params"), given)
	if err != nil {
		return err
	}
	templates, _ := configuration["data"].(object)
	for _, name := range slices.Sorted(maps.Keys(templates)) {
		text, ok := templates[name].(string)
		if !ok {
			return fmt.Errorf("file %q: its template is not a string", name)
		}
		if err := checkFileName(name); err != nil {
			return err
		}
		announce(name)
		attempt := func(c mountedClass) ([]byte, error) {
			data := func(token string) any { return templateData(c, params, token) }
			return renderFile(name, text, data, token)
		}
		content, err := attempt(c)
		if err != nil {
			return fmt.Errorf("%w%s", err, hintNoProxy(c, attempt, err))
		}
		if err := out.add(name, content); err != nil {
			return fmt.Errorf("file %q: %w", name, err)
		}
	}
	return nil
}

// hintNoProxy names the usual reason why a template fails on a Connector created a moment ago, if that is
// what it fails for: with an address of a proxy it would do something else.
func hintNoProxy(c mountedClass, attempt func(mountedClass) ([]byte, error), failed error) string {
	lacking := ""
	c.connectors = slices.Clone(c.connectors)
	for i, connector := range c.connectors {
		if proxyAddress(connector) != "" {
			continue
		}
		lacking = cmp.Or(lacking, fullName(connector))
		before, _ := connector["status"].(object)
		connector, status := maps.Clone(connector), object{}
		maps.Copy(status, before)
		status["proxy"] = object{"httpAddress": object{"url": "http://proxy.example.com"}}
		connector["status"], c.connectors[i] = status, connector
	}
	if lacking == "" {
		return ""
	}
	if _, err := attempt(c); err != nil && err.Error() == failed.Error() {
		return ""
	}
	return fmt.Sprintf("; Connector %s has no proxy address yet (status.proxy.httpAddress.url): wait for "+
		"the Connectors operator to set it, or look at the class's spec.proxy and the Connector's conditions",
		lacking)
}

// templateData is what the templates of a class see.
func templateData(c mountedClass, params map[string]any, token string) map[string]any {
	var connectors []any
	for _, connector := range c.connectors {
		connectors = append(connectors, connectorData(connector))
	}
	class := object{}
	if address := proxyAddress(c.class); address != "" {
		class["proxyAddress"] = address
	}
	return map[string]any{
		"connector":      connectors[0],
		"connectors":     connectors,
		"connectorclass": class,
		"configurations": deepCopy(params),
		"context":        map[string]any{"token": token, "proxy": map[string]any{"caCert": caCert(c)}},
	}
}

// connectorData is the Connector as the API server sent it, with status.proxyAddress, name and namespace. It
// is a copy all through, for each file: sprig has functions that change their arguments.
func connectorData(connector object) object {
	data := deepCopy(connector).(object)
	data["name"], data["namespace"] = nameOf(connector), stringAt(connector, "metadata", "namespace")
	if address := proxyAddress(connector); address != "" {
		data["status"].(object)["proxyAddress"] = address // proxyAddress found something in status
	}
	return data
}

// proxyAddress is the proxy's address in the status of a Connector or of a class, or "".
func proxyAddress(o object) string {
	return cmp.Or(stringAt(o, "status", "proxyAddress"), stringAt(o, "status", "proxy", "httpAddress", "url"))
}

// caCert is the CA certificate of the proxy: the last one that a Connector of the class names, or else the
// class's, or else "".
func caCert(c mountedClass) string {
	for _, connector := range slices.Backward(c.connectors) {
		if pem := stringAt(connector, "status", "proxy", "httpAddress", "CACerts"); pem != "" {
			return pem
		}
	}
	return stringAt(c.class, "status", "proxy", "httpAddress", "CACerts")
}

// paramTypes are those that a class can declare a parameter with: JSON schema's.
var paramTypes = []string{"string", "integer", "number", "boolean", "array", "object"}

// kindOf names the type of a value in the words of paramTypes.
func kindOf(value any) string {
	kinds := map[string]string{"string": "string", "int64": "integer", "float64": "number", "bool": "boolean",
		"[]interface {}": "array", "map[string]interface {}": "object"}
	return kinds[fmt.Sprintf("%T", value)]
}

// resolveParams checks the supplied parameters against the declared ones and adds the defaults. Parameters
// that are not declared pass through, since classes exist that use them without declaring them.
func resolveParams(declared []object, supplied map[string]any) (map[string]any, error) {
	params := map[string]any{}
	maps.Copy(params, supplied)
	for _, d := range declared {
		name, kind := stringAt(d, "name"), cmp.Or(stringAt(d, "type"), "string")
		if !slices.Contains(paramTypes, kind) {
			return nil, fmt.Errorf("param %q is declared with the type %q; there are %s", name,
				cut(kind, maxQuotedBytes), strings.Join(paramTypes, ", "))
		}
		value, ok := supplied[name]
		if !ok {
			if params[name], ok = d["default"]; !ok {
				return nil, podError(fmt.Errorf("required configuration param %q is missing: set it in "+
					"configuration.params", name))
			}
			continue
		}
		if is := kindOf(value); is != kind && (is != "integer" || kind != "number") {
			return nil, podError(fmt.Errorf("configuration param %q must be of type %s, not %s", name, kind,
				is))
		}
		allowed, _ := d["enum"].([]any)
		values, isList := value.([]any)
		if !isList {
			values = []any{value}
		}
		for _, v := range values {
			if len(allowed) > 0 && !slices.ContainsFunc(allowed,
				func(a any) bool { return fmt.Sprint(a) == fmt.Sprint(v) }) {
				return nil, podError(fmt.Errorf("configuration param %q must be one of %v, not %q", name,
					allowed, cut(fmt.Sprint(v), maxQuotedBytes)))
			}
		}
	}
	return params, nil
}

// renderBuiltIn makes the files that the product mounts in every volume since its release 1.6. One that has
// no value, since there is no proxy or no CA, is left out. The proxy and the CA are those of the last class.
func renderBuiltIn(out *volumeFiles, mounted []mountedConnector, last mountedClass, token string) error {
	address := proxyAddress(last.class)
	if len(mounted) == 1 || address == "" {
		address = cmp.Or(proxyAddress(last.connectors[len(last.connectors)-1]), address)
	}
	add := map[string]string{"context.token": token, "connector.status.proxyAddress": address}
	for _, name := range []string{"context.proxy.caCert", "ca.crt", "ca.cert"} {
		add[name] = caCert(last)
	}
	if address != "" {
		proxy, err := authenticatedProxy(address, mounted, token)
		if err != nil {
			return err
		}
		add["http.proxy"], add["https.proxy"] = proxy, proxy
		add[".curlrc"] = "proxy = " + proxy + "\n"
		for _, v := range [][2]string{{"http_proxy", proxy}, {"https_proxy", proxy},
			{"no_proxy", "localhost,127.0.0.1"}} {
			add[".env"] += v[0] + "=" + v[1] + "\n" + strings.ToUpper(v[0]) + "=" + v[1] + "\n"
		}
	}
	for name, value := range add {
		if value == "" {
			continue
		}
		if err := out.add(name, []byte(value)); err != nil {
			return err
		}
	}
	return nil
}

// plainHost is what a host and port may consist of so that a proxy URL needs no quoting in a shell or curlrc.
var plainHost = regexp.MustCompile(`^[-.:\[\]_a-zA-Z0-9]+$`)

// authenticatedProxy is the URL of the forward proxy with the Connectors' names as user and the token as
// password. The port is always written, since curl takes 1080 for a proxy without one.
func authenticatedProxy(address string, mounted []mountedConnector, token string) (string, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || !plainHost.MatchString(u.Host) {
		return "", fmt.Errorf("the proxy address %q is not an http or https URL", address)
	}
	if u.Port() == "" {
		u.Host = strings.TrimSuffix(u.Host, ":") + map[string]string{"http": ":80", "https": ":443"}[u.Scheme]
	}
	var users []string
	for _, m := range mounted {
		users = append(users, fullName(m.connector))
	}
	proxy := url.URL{Scheme: u.Scheme, Host: u.Host, User: url.UserPassword(strings.Join(users, ","), token)}
	return proxy.String(), nil
}

// volumeFiles collects the files of a volume and keeps them within its limits.
type volumeFiles struct {
	files files
	bytes int
}

// add puts a file in the place of an earlier one of that name, if there is one.
func (v *volumeFiles) add(name string, content []byte) error {
	old, replaces := v.files[name]
	bytes := v.bytes + len(content) - len(old)
	if bytes > maxVolumeBytes || !replaces && len(v.files) == maxVolumeFiles {
		return fmt.Errorf("a volume may hold %d KiB in %d files", maxVolumeBytes>>10, maxVolumeFiles)
	}
	v.files[name], v.bytes = content, bytes
	return nil
}

var fileName = regexp.MustCompile(`^[-._a-zA-Z0-9]+$`)

// checkFileName allows what a ConfigMap's key may be: no path, and no name that the volume's layout uses.
func checkFileName(name string) error {
	if !fileName.MatchString(name) || len(name) > 253 || name == "." || strings.HasPrefix(name, "..") {
		return fmt.Errorf("file name %q is not allowed: it must consist of 1 to 253 letters, digits, '-', "+
			"'_' or '.', must not be '.' and must not begin with '..'", name)
	}
	return nil
}

// placeholderToken stands for a token where none may be seen. It has the form, the length and the characters
// of a ServiceAccount's.
var placeholderToken = func() string {
	encode := func(text string) string { return base64.RawURLEncoding.EncodeToString([]byte(text)) }
	signature := strings.Repeat("\xfb\xff\xbf.", 64)
	return encode(`{"alg":"RS256","kid":"placeholder"}`) + "." +
		encode(`{"sub":"`+strings.Repeat("placeholder", 55)+`"}`) + "." + encode(signature)
}()

// renderFile renders one template.
//
// The text of an error may come out of the template ({{ fail .context.token }}), so an error is reported as
// it is without the token: from another run, with a word or a placeholder for it, that fails where it does.
func renderFile(name, text string, data func(token string) any, token string) ([]byte, error) {
	t, err := parseTemplate(name, text)
	if err != nil {
		return nil, plainError(name, text, err)
	}
	var content bytes.Buffer
	if err = t.Execute(&content, data(token)); err == nil {
		return content.Bytes(), nil
	}
	place := func(err error) string { // line and column
		return templateError.ReplaceAllString(err.Error(), "$1:$2")
	}
	for _, shown := range []string{"TOKEN", placeholderToken} {
		if again := t.Execute(io.Discard, data(shown)); again != nil && place(again) == place(err) {
			said := plainError(name, text, again).Error()
			return nil, errors.New(strings.ReplaceAll(said, placeholderToken, "TOKEN"))
		}
	}
	return nil, fmt.Errorf("file %q fails because of the token's value", name)
}

// templateError is what text/template says of a template: its name, the line, the column, if it was executed,
// the function that has failed, if one has, and why.
var templateError = regexp.MustCompile(
	`(?s)^template: .*?:(\d+)(?::(\d+))?: (?:executing ".*?" at <.*?>: )?(?:error calling (\w+): )?(.*)$`)

// plainError says which action of a template fails, and why.
func plainError(file, template string, err error) error {
	match := templateError.FindStringSubmatch(err.Error())
	if match == nil {
		return fmt.Errorf("file %q: %w", file, err)
	}
	line, column, function, text := match[1], match[2], match[3], match[4]
	where := file + " line " + line
	if column != "" {
		where += ": {{ " + actionAt(template, line, column) + " }}"
	}
	if function == checkFunction {
		return fmt.Errorf("%s %s", where, text)
	}
	return fmt.Errorf("%s: %s", where, text)
}

// actionAt returns the text of the action at a line and a column of a template, as its errors count them.
func actionAt(template, line, column string) string {
	n, _ := strconv.Atoi(line)
	at, _ := strconv.Atoi(column)
	for _, before := range strings.SplitAfter(template, "\n")[:n-1] {
		at += len(before)
	}
	action, _, _ := strings.Cut(template[strings.LastIndex(template[:at], "{{"):], "}}")
	return cut(strings.Trim(action, "{-} \t\n"), maxQuotedBytes)
}

// ---- Functions: nothing broken reaches a file ----
//
// A value is missing if there is no such key, if it is JSON's null, or if it is nil. Templates may ask for
// it, and put it into collections; whatever else gets it fails, and so does what prints it at any depth.
// Functions also fail that would say so in the file, or return something else than was asked for.

// family are functions whose arguments are treated in the same way.
type family struct {
	names   string
	missing int                          // the number of the first argument that may be missing, if any may
	meet    func(value any) (any, error) // what the function gets for a value, if it is to be another one
	result  *regexp.Regexp               // what does not match it is the text of an error
}

// families are the functions of which more is known than that they want values. missing and meet are about
// parameters of any type alone.
var families = []family{
	{`all any coalesce deepEqual default dict dig empty get has hasKey index kindIs kindOf list pluck ternary
		tuple typeIs typeIsLike typeOf`, 1, nil, nil},
	{`append prepend push set without`, 2, nil, nil},
	{`cat html join js print printf println quote sortAlpha squote toJson toPrettyJson toRawJson toString
		toStrings urlJoin urlquery`, 0, printed, nil},
	{`add add1 biggest div duration max min mod mul sub`, 0, wholeNumber, nil},
	{`int int64`, 0, truncated, nil},
	{`add1f addf ceil divf float64 floor maxf minf mulf round subf`, 0, float, nil},
	{`ago date dateInZone date_in_zone htmlDate htmlDateInZone`, 0, date, nil},
	{`bcrypt`, 0, nil, regexp.MustCompile(`^\$2`)},
	{`htpasswd`, 0, nil, regexp.MustCompile(`^[^:]*:\$2`)},
	{`genPrivateKey`, 0, nil, regexp.MustCompile(`^-----BEGIN `)},
	{`derivePassword`, 0, nil, regexp.MustCompile(`^[^ ]+$`)},
	{`randAlpha randAlphaNum randAscii randNumeric seq`, 0, nil, regexp.MustCompile(`.`)},
}

// functions are those that templates may call beside text/template's: sprig's except env, expandenv and
// getHostByName, which would hand the environment and the network to the author of a class. Where sprig has a
// variant with must, which returns its error, that is the function of both names.
var functions = func() template.FuncMap {
	sprigs := sprig.TxtFuncMap()
	own := ownFunctions(sprigs)
	familyOf := map[string]family{}
	for _, f := range families {
		for _, name := range strings.Fields(f.names) {
			familyOf[name] = f
		}
	}
	guarded := maps.Clone(sprigs)
	maps.Copy(guarded, own)
	for _, name := range []string{"env", "expandenv", "getHostByName"} {
		delete(guarded, name)
	}
	for name := range guarded {
		base := name
		if rest, ok := strings.CutPrefix(name, "must"); ok {
			base = strings.ToLower(rest[:1]) + rest[1:]
		}
		must := sprigs["must"+strings.ToUpper(base[:1])+base[1:]]
		guarded[name] = familyOf[base].guard(name, cmp.Or(own[base], must, sprigs[name]))
	}
	return guarded
}()

// guard returns the function as templates call it, with arguments of any number and type. What call panics about
// is an error of the template.
func (f family) guard(name string, call any) func(arguments ...any) (any, error) {
	function := reflect.ValueOf(call)
	least, more, orMore := function.Type().NumIn(), function.Type().IsVariadic(), ""
	if more {
		least, orMore = least-1, " or more"
	}
	return func(arguments ...any) (any, error) {
		in := make([]reflect.Value, len(arguments))
		if len(in) < least || len(in) > least && !more {
			return nil, fmt.Errorf("%s takes %d arguments%s, not %d", name, least, orMore, len(in))
		}
		for i, argument := range arguments {
			var err error
			if in[i], err = f.argument(i, argument, function.Type()); err != nil {
				return nil, fmt.Errorf("argument %d of %s %w", i+1, name, err)
			}
		}
		out := function.Call(in)
		if text, ok := out[0].Interface().(string); ok && f.result != nil && !f.result.MatchString(text) {
			return nil, errors.New(cmp.Or(text, "the result is empty"))
		}
		err, _ := out[len(out)-1].Interface().(error)
		return out[0].Interface(), err
	}
}

// argument returns an argument as a function of that type gets it. A list by its type, of a certificate's
// addresses or names, may be missing.
func (f family) argument(i int, value any, function reflect.Type) (reflect.Value, error) {
	last := function.NumIn() - 1
	parameter := function.In(min(i, last))
	if function.IsVariadic() && i >= last {
		parameter = parameter.Elem()
	}
	kind := parameter.Kind()
	ofAnyType := kind == reflect.Interface || kind == reflect.Map
	if isMissing(value) {
		if kind == reflect.Slice || ofAnyType && f.missing > 0 && i+1 >= f.missing {
			return reflect.Zero(parameter), nil
		}
		return reflect.Value{}, errNoValue
	}
	if ofAnyType && f.meet != nil {
		met, err := f.meet(value)
		return reflect.ValueOf(met), err
	}
	v := reflect.ValueOf(value)
	if (v.CanInt() || v.CanFloat()) && kind >= reflect.Int && kind <= reflect.Float64 {
		if converted := v.Convert(parameter); converted.Convert(v.Type()).Equal(v) {
			return converted, nil
		}
	}
	if !v.Type().AssignableTo(parameter) {
		return v, fmt.Errorf("is %v, not %v", v.Type(), parameter)
	}
	return v, nil
}

// ownFunctions take the place of functions that return the text of their error, take nonsense for something,
// or stumble over a missing value. Those of text/template are here for the guard.
func ownFunctions(sprigs template.FuncMap) template.FuncMap {
	inZone := func(layout string, date any, zone string) (string, error) {
		_, err := time.LoadLocation(zone)
		return sprigs["dateInZone"].(func(string, any, string) string)(layout, date, zone), err
	}
	asText := func(decoded []byte, err error) (string, error) { return string(decoded), err }
	return template.FuncMap{
		"html": template.HTMLEscaper, "js": template.JSEscaper, "urlquery": template.URLQueryEscaper,
		"print": fmt.Sprint, "println": fmt.Sprintln, "printf": printf,

		// Collections
		"get":   func(from object, key string) any { return from[key] },
		"index": lookUp,
		"dig": func(arguments ...any) (any, error) { // keys, a default, a dict
			last := len(arguments) - 1
			if last < 2 {
				return nil, errors.New("dig needs a key, a default and a dict")
			}
			found, err := lookUp(arguments[last], arguments[:last-1]...)
			return cmp.Or(found, arguments[last-1]), err
		},
		"dict": func(pairs ...any) (object, error) {
			for i := range pairs {
				if i%2 == 0 && (isMissing(pairs[i]) || i+1 == len(pairs)) {
					return nil, errNoKey
				}
			}
			return sprigs["dict"].(func(...any) object)(pairs...), nil
		},
		"slice": func(list any, bounds ...int) (any, error) {
			v := reflect.ValueOf(list)
			if v.Kind() != reflect.Slice {
				return nil, fmt.Errorf("%T is no list", list)
			}
			switch len(bounds) {
			case 0:
				return list, nil
			case 1:
				return v.Slice(bounds[0], v.Len()).Interface(), nil
			case 2:
				return v.Slice(bounds[0], bounds[1]).Interface(), nil
			}
			return nil, errors.New("slice takes two bounds at most")
		},
		"chunk": func(size int, list any) (lists []any, _ error) {
			if size < 1 {
				return nil, errors.New("the size is below one")
			}
			chunks, err := sprigs["mustChunk"].(func(int, any) ([][]any, error))(size, list)
			for _, chunk := range chunks {
				lists = append(lists, chunk)
			}
			return lists, err
		},

		// Numbers
		"add":  func(numbers ...any) (int64, error) { return exactly((*big.Int).Add, int64(0), numbers...) },
		"add1": func(number any) (int64, error) { return exactly((*big.Int).Add, number, int64(1)) },
		"sub":  func(a, b any) (int64, error) { return exactly((*big.Int).Sub, a, b) },
		"mul":  func(a any, more ...any) (int64, error) { return exactly((*big.Int).Mul, a, more...) },
		"atoi": strconv.Atoi,
		"toDecimal": func(octal any) (int64, error) {
			return strconv.ParseInt(fmt.Sprint(octal), 8, 64)
		},
		"fromJson": func(text string) (any, error) {
			value, err := parseJSON([]byte(text))
			if err != nil {
				return nil, err
			}
			return mapLeaves(value, func(leaf any) (any, error) {
				number, _ := leaf.(json.Number)
				text := string(number)
				f, err := number.Float64()
				if err == nil && (plainNumber(f).String() == text || strings.ContainsAny(text, ".eE")) {
					return f, nil
				}
				return keptNumber(leaf)
			})
		},

		// Time
		"date_modify": sprigs["mustDateModify"],
		"dateInZone":  inZone, "date_in_zone": inZone,
		"htmlDateInZone": func(date any, zone string) (string, error) {
			return inZone(time.DateOnly, date, zone)
		},
		"duration": func(seconds any) (string, error) {
			d, err := time.ParseDuration(fmt.Sprint(seconds, "s"))
			return d.String(), err
		},
		"durationRound": func(duration any) (_ string, err error) {
			if text, ok := duration.(string); ok {
				_, err = time.ParseDuration(text)
			} else {
				duration, err = date(duration)
			}
			return sprigs["durationRound"].(func(any) string)(duration), err
		},

		// Texts
		"b64dec": func(code string) (string, error) { return asText(base64.StdEncoding.DecodeString(code)) },
		"b32dec": func(code string) (string, error) { return asText(base32.StdEncoding.DecodeString(code)) },
	}
}

// errNoValue is returned for a value that is missing, errNoKey for a key that is, or that has none.
var (
	errNoValue = errors.New("has no value")
	errNoKey   = errors.New("a key has no value")
)

// isMissing reports whether there is no value. A list that is nil is what functions return for an empty one.
func isMissing(value any) bool {
	v := reflect.ValueOf(value)
	return !v.IsValid() || v.Kind() == reflect.Map && v.IsNil()
}

// lookUp returns what is at that path of keys and indexes in a collection, or nil where a part of the path is
// missing. It panics where there can be none.
func lookUp(item any, path ...any) (any, error) {
	for _, key := range path {
		collection := reflect.ValueOf(item)
		switch {
		case isMissing(item):
			return nil, nil
		case key == nil:
			return nil, errNoKey
		case collection.Kind() != reflect.Map:
			item = collection.Index(int(reflect.ValueOf(key).Int())).Interface()
			continue
		}
		element := collection.MapIndex(reflect.ValueOf(key))
		if !element.IsValid() {
			return nil, nil
		}
		item = element.Interface()
	}
	return item, nil
}

// exactly computes with whole numbers from left to right, and refuses a result that is too large for one.
func exactly(compute func(z, x, y *big.Int) *big.Int, first any, more ...any) (int64, error) {
	result := big.NewInt(first.(int64))
	for _, number := range more {
		compute(result, result, big.NewInt(number.(int64)))
	}
	if !result.IsInt64() {
		return 0, errors.New("the result is beyond 64 bits")
	}
	return result.Int64(), nil
}

// printf is fmt's, for which a wrong number or type of values is no error but a mark in the result. It
// refuses more marks than there are in the values and in the format.
func printf(format string, values ...any) (string, error) {
	const mark = "%!"
	text := fmt.Sprintf(format, values...)
	marks := strings.Count(text, mark)
	if marks > 0 && marks > strings.Count(fmt.Sprintln(values...), mark)+strings.Count(format, "%"+mark) {
		return "", fmt.Errorf("the format %q does not fit its values: %s", cut(format, maxQuotedBytes),
			cut(text[strings.Index(text, mark):], maxQuotedBytes))
	}
	return text, nil
}

// plainNumber is a float that is printed in plain decimals: 1000000, not 1e+06.
type plainNumber float64

func (n plainNumber) String() string { return strconv.FormatFloat(float64(n), 'f', -1, 64) }

func (n plainNumber) MarshalJSON() ([]byte, error) { return []byte(n.String()), nil }

// Format leaves all verbs but %v to fmt.
func (n plainNumber) Format(state fmt.State, verb rune) {
	if _, rounded := state.Precision(); verb == 'v' && !rounded && !state.Flag('#') {
		fmt.Fprintf(state, fmt.FormatString(state, 's'), n.String())
	} else {
		fmt.Fprintf(state, fmt.FormatString(state, verb), float64(n))
	}
}

// printed returns a value as it is printed, unless there is something missing in it.
func printed(value any) (any, error) {
	return mapLeaves(value, func(leaf any) (any, error) {
		v := reflect.ValueOf(leaf)
		switch {
		case isMissing(leaf):
			return nil, errNoValue
		case v.Kind() == reflect.Slice && v.IsNil():
			return []any{}, nil
		case !v.CanFloat():
			return leaf, nil
		case math.IsNaN(v.Float()) || math.IsInf(v.Float(), 0):
			return nil, fmt.Errorf("is %v, not a number", leaf)
		}
		return plainNumber(v.Float()), nil
	})
}

// mapLeaves returns a copy of a value with what change makes of everything in it that is no list and no dict.
// Its errors say where in the value something is wrong.
func mapLeaves(value any, change func(leaf any) (any, error)) (any, error) {
	changed, path, err := mapLeavesAt(value, change)
	if path != "" {
		err = fmt.Errorf("%w at %s", err, path)
	}
	return changed, err
}

// mapLeavesAt is mapLeaves, with the place apart.
func mapLeavesAt(value any, change func(any) (any, error)) (changed any, path string, err error) {
	switch v := value.(type) {
	case object:
		if v == nil {
			break
		}
		c := make(object, len(v))
		for _, key := range slices.Sorted(maps.Keys(v)) { // so that an error is the same each time
			if c[key], path, err = mapLeavesAt(v[key], change); err != nil {
				return nil, fmt.Sprintf("[%q]", key) + path, err
			}
		}
		return c, "", nil
	case []any:
		c := make([]any, len(v))
		for i, element := range v {
			if c[i], path, err = mapLeavesAt(element, change); err != nil {
				return nil, fmt.Sprintf("[%d]", i) + path, err
			}
		}
		return c, "", nil
	}
	changed, err = change(value)
	return changed, "", err
}

// wholeNumber returns the int64 that a value is, or that a text holds.
func wholeNumber(value any) (any, error) {
	v, text := reflect.ValueOf(value), fmt.Sprint(value)
	switch {
	case v.CanInt():
		return v.Int(), nil
	case v.CanFloat():
		text = plainNumber(v.Float()).String()
	case v.Kind() == reflect.Bool:
		text = map[bool]string{false: "0", true: "1"}[v.Bool()]
	}
	if before, after, _ := strings.Cut(text, "."); after != "" && strings.Trim(after, "0") == "" {
		text = before
	}
	whole, err := strconv.ParseInt(text, 0, 64)
	if err != nil {
		return nil, fmt.Errorf("is %.99q, not a whole number of 64 bits", fmt.Sprint(value))
	}
	return whole, nil
}

// truncated is wholeNumber without what stands behind the point of a float.
func truncated(value any) (any, error) {
	if v := reflect.ValueOf(value); v.CanFloat() {
		value = math.Trunc(v.Float())
	}
	return wholeNumber(value)
}

// float returns the float64 that a value is, or that a text holds.
func float(value any) (any, error) {
	if whole, err := wholeNumber(value); err == nil {
		return float64(whole.(int64)), nil
	}
	f, err := strconv.ParseFloat(fmt.Sprint(value), 64)
	if err != nil || math.IsNaN(f) || math.IsInf(f, 0) {
		return nil, fmt.Errorf("is %.99q, not a number", fmt.Sprint(value))
	}
	return f, nil
}

// date returns the time that a value is, or the seconds since 1970 as int64.
func date(value any) (any, error) {
	if _, isTime := value.(time.Time); isTime {
		return value, nil
	}
	if seconds, err := wholeNumber(value); err == nil && reflect.ValueOf(value).Kind() != reflect.String {
		return seconds, nil
	}
	return nil, fmt.Errorf("is %.99q, not a date: toDate makes one of a text", fmt.Sprint(value))
}

// parseTemplate parses a template, and lets what its actions print go through a check. It gets only the
// functions that its text can name, since each one costs more time than the search for it.
func parseTemplate(name, text string) (*template.Template, error) {
	named := template.FuncMap{}
	separates := func(r rune) bool { return r != '_' && !unicode.IsLetter(r) && !unicode.IsDigit(r) }
	for word := range strings.FieldsFuncSeq(text, separates) {
		if f := functions[word]; f != nil {
			named[word] = f
		}
	}
	t, err := template.New(name).Funcs(named).Parse(text)
	if err != nil {
		return nil, err
	}
	t.Funcs(template.FuncMap{checkFunction: printed})
	for _, defined := range t.Templates() {
		checkPrinted(defined.Root)
	}
	return t, nil
}

// checkFunction is the function that checks what is printed. It is added after parsing, so that no template
// can name it.
const checkFunction = "checked"

// checkPrinted appends checkFunction to all pipelines that are printed, as html/template does with its
// escapers.
func checkPrinted(list *parse.ListNode) {
	if list == nil {
		return
	}
	for _, node := range list.Nodes {
		switch n := node.(type) {
		case *parse.ActionNode:
			if len(n.Pipe.Decl) == 0 {
				check := parse.NewIdentifier(checkFunction).SetPos(n.Pos)
				n.Pipe.Cmds = append(n.Pipe.Cmds, &parse.CommandNode{NodeType: parse.NodeCommand, Pos: n.Pos,
					Args: []parse.Node{check}})
			}
		case *parse.IfNode:
			checkPrinted(n.List)
			checkPrinted(n.ElseList)
		case *parse.WithNode:
			checkPrinted(n.List)
			checkPrinted(n.ElseList)
		case *parse.RangeNode:
			checkPrinted(n.List)
			checkPrinted(n.ElseList)
		}
	}
}

// parseJSON decodes one JSON value, with its numbers as they are written.
func parseJSON(data []byte) (any, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON value")
	}
	return value, nil
}

// decodeJSON decodes one JSON value as the Kubernetes API means it: a null in an object is the same as a
// missing field, whole numbers are int64 (template functions print and compare them as such).
func decodeJSON(data []byte) (any, error) {
	value, err := parseJSON(data)
	return normalize(value), err
}

// decodeParams decodes parameters like decodeJSON, and refuses numbers that would not stay what they are. The
// API server has made a float of such a number long before one is read.
func decodeParams(data []byte) (any, error) {
	value, err := parseJSON(data)
	if err != nil {
		return nil, err
	}
	value, err = mapLeaves(value, keptNumber)
	return normalize(value), err
}

// keptNumber is the int64 or the float64 of a JSON number, unless that is another number.
func keptNumber(leaf any) (any, error) {
	number, isNumber := leaf.(json.Number)
	if !isNumber {
		return leaf, nil
	}
	if i, err := number.Int64(); err == nil {
		return i, nil
	}
	f, err := number.Float64()
	if err != nil || !strings.ContainsAny(string(number), ".eE") {
		return nil, fmt.Errorf("%s does not fit into 64 bits: write it as a string", number)
	}
	return f, nil
}

// normalize brings a decoded value into the form that decodeJSON promises, in place.
func normalize(value any) any {
	switch v := value.(type) {
	case object:
		for key, field := range v {
			if field == nil {
				delete(v, key)
			} else {
				v[key] = normalize(field)
			}
		}
	case []any:
		for i := range v {
			v[i] = normalize(v[i])
		}
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return i
		}
		f, _ := v.Float64()
		return f
	}
	return value
}

func deepCopy(value any) any {
	c, _ := mapLeaves(value, func(leaf any) (any, error) { return leaf, nil })
	return c
}

// valueAt returns what is at that path of fields, or nil.
func valueAt(value any, path ...string) any {
	for _, field := range path {
		o, _ := value.(object)
		value = o[field]
	}
	return value
}

func stringAt(o object, path ...string) string {
	s, _ := valueAt(o, path...).(string)
	return s
}

// objectList returns the objects in the list at that path.
func objectList(o object, path ...string) []object {
	list, _ := valueAt(o, path...).([]any)
	var objects []object
	for _, element := range list {
		if e, ok := element.(object); ok {
			objects = append(objects, e)
		}
	}
	return objects
}

func nameOf(o object) string { return stringAt(o, "metadata", "name") }

// fullName is how the proxy and this driver's messages name a Connector.
func fullName(o object) string { return stringAt(o, "metadata", "namespace") + "/" + nameOf(o) }

// ---- The renderer: the process that runs render, and that nobody trusts ----
//
// Whoever writes a template, a Connector or a Pod's parameters can make render take all memory and time there
// is: sprig allocates before anybody can look, and an endless recursion ends a Go process. So the driver runs
// it in a child process of the same binary, in which the kernel limits memory and time, and which reaches
// nothing but the pipes to its parent.
//
// The life of a renderer: start clones it into namespaces of its own; confine takes from it whatever it does
// not need, and executes the binary once more, so that every thread is confined; serveJobs answers one request
// after another, each for one volume of the namespace that it was started for. It ends when it has been idle
// for rendererIdle, when a Pod of another namespace needs one, when it hits a limit, or when it has used half of
// the processor time of its life.

const (
	confineArgument = "renderer"          // the first argument of a process that is to call confine
	serveArgument   = "confined-renderer" // and of one that is to call serveJobs

	statusDescriptor = 15 // of /proc/self/status, from confine to limitMemory; the highest that a renderer may have

	maxRenderers = 2
	rendererIdle = 10 * time.Second
	rendererUID  = 65532 // user and group, where the driver may choose

	rendererThreads = 32 // and processes; Go needs seven at most

	// What rendering one volume may take. The kernel counts what the process maps beyond what it maps at its
	// start; runtimeMemory is for Go's own needs.
	renderMemory        = 64 << 20
	runtimeMemory       = 8 << 20
	renderProcessorTime = 2 * time.Second
	renderTime          = 5 * time.Second

	// lifeProcessorTime is what the kernel kills a renderer at, whether there is a driver or not. One that
	// has used half of it is replaced: so the driver's own limit, renderProcessorTime, comes first.
	lifeProcessorTime = 5 * time.Second

	// The account of processor time that each namespace has. accountRefill is in seconds a second.
	accountSize   = 10 * time.Second
	accountRefill = 0.05
	// What a job that was cheap may have when the account is empty: ten times what it took before, within
	// bounds.
	minAllowance = 20 * time.Millisecond
	maxAllowance = 200 * time.Millisecond

	// How long a job that hit a limit is not tried again: twice as long each time.
	minPause = 30 * time.Second
	maxPause = 10 * time.Minute

	maxOutcomes          = 1024 // that are remembered
	maxNamespaceOutcomes = 64
)

// source is a Connector that a volume mounts, with its class, as the API server sent them.
type source struct{ connector, class *apiObject }

// job is what a renderer needs to know: the files of one volume.
type job struct {
	sources   []source
	selection selection
	token     string
	key       [sha256.Size]byte // inputsDigest: of the Pod's namespace, the attributes, the objects' versions
}

// ticket is what somebody waits with in a queue, or is active by.
type ticket struct {
	namespace string
	key       [sha256.Size]byte // of a job
	began     chan struct{}     // is closed when it becomes active
}

// queue lets a number of tickets be active at once.
type queue struct {
	before func(a, b *ticket) bool // whether a is next rather than b
	ready  func(*ticket) bool      // whether it may be active now

	mu       sync.Mutex // guards the rest; the functions above are called with it
	capacity int
	waiting  []*ticket // the longest first
	active   []*ticket
}

// acquire returns once the ticket is active, or when ctx ends.
func (q *queue) acquire(ctx context.Context, t *ticket) error {
	t.began = make(chan struct{})
	q.mu.Lock()
	q.waiting = append(q.waiting, t)
	q.admit()
	q.mu.Unlock()
	select {
	case <-t.began:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, t); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	} else { // it began at this very moment
		q.releaseLocked(t)
	}
	return fmt.Errorf("others were served first: %w", ctx.Err())
}

// release ends a ticket that is active.
func (q *queue) release(t *ticket) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.releaseLocked(t)
}

// releaseLocked is release for a caller that holds the lock. The next ticket is chosen while this one still
// counts in before and ready, so that it is another's.
func (q *queue) releaseLocked(t *ticket) {
	q.capacity++
	q.admit()
	q.capacity--
	q.active = slices.DeleteFunc(q.active, func(other *ticket) bool { return other == t })
	q.admit()
}

// admit makes as many tickets active as there may be. The caller holds the lock.
func (q *queue) admit() {
	for len(q.active) < q.capacity {
		next := -1
		for i, t := range q.waiting {
			if q.ready(t) && (next < 0 || q.before(t, q.waiting[next])) {
				next = i
			}
		}
		if next < 0 {
			return
		}
		t := q.waiting[next]
		q.waiting = slices.Delete(q.waiting, next, next+1)
		q.active = append(q.active, t)
		close(t.began)
	}
}

// activeOf returns how many tickets of the namespace are active. The caller holds the lock.
func (q *queue) activeOf(namespace string) (number int) {
	for _, t := range q.active {
		if t.namespace == namespace {
			number++
		}
	}
	return number
}

// renderers runs the renderers of the node, at most maxRenderers at a time. Whoever waits for one is served
// in the order of the fullest account, so that one namespace's slow templates make nobody else wait for long;
// and a job that is not known to be cheap is rendered by one at a time, so that many Pods with the same one
// learn from the first of them that it hits a limit.
type renderers struct {
	queue
	binary  string // this program
	log     *slog.Logger
	metrics *metrics

	// The lock of queue guards the rest.
	best     int                 // of the confinements that have worked, after which none is tried
	idle     []*renderer         // the longest idle first; with those that calls hold, at most maxRenderers
	accounts map[string]*account // by namespace; those that are not full
	outcomes map[[sha256.Size]byte]outcome
}

// account is what a namespace has left of its processor time.
type account struct {
	left   time.Duration // at that time; below zero after an expensive rendering
	at     time.Time
	most   time.Duration // what the most expensive rendering took, since the account was full
	mostBy string        // the step at which that ended
}

// outcome is what came of rendering something, by the digest of the job.
type outcome struct {
	namespace string
	at        time.Time
	allowance time.Duration // of processor time, for the next while the account is empty; 0 if it is not cheap
	limit     error         // of memory or processor time that it hit, or nil
	pause     time.Duration // for which it is not tried again, if so
}

func newRenderers(binary string, log *slog.Logger, m *metrics) *renderers {
	p := &renderers{binary: binary, log: log, metrics: m, accounts: map[string]*account{},
		outcomes: map[[sha256.Size]byte]outcome{}, best: len(confinements)}
	p.capacity = maxRenderers
	p.before = func(a, b *ticket) bool { return p.left(a.namespace) > p.left(b.namespace) }
	p.ready = func(t *ticket) bool {
		same := func(other *ticket) bool { return other.key == t.key }
		return p.outcomes[t.key].allowance > 0 || !slices.ContainsFunc(p.active, same)
	}
	return p
}

// render makes the files of a volume for a Pod of the namespace:
//
//  1. wait with a ticket, unless the namespace's account is empty or this is known to hit a limit
//  2. obtain the namespace's idle renderer, or start one
//  3. ask it
//  4. charge the account, remember the outcome, and let the next call in
//
// Its errors are failures with their codes, wrap that of ctx, or are about a class or a Connector.
func (p *renderers) render(ctx context.Context, namespace string, j job) (files, error) {
	// 1. wait
	if err := p.refusal(namespace, j.key); err != nil {
		return nil, err
	}
	t := &ticket{namespace: namespace, key: j.key}
	if err := p.acquire(ctx, t); err != nil {
		return nil, err
	}
	defer p.release(t)
	if err := p.refusal(namespace, j.key); err != nil { // since others were rendered
		return nil, err
	}

	// 2. obtain
	r, most, err := p.obtain(t)
	if err != nil {
		return nil, failuref(codes.Unavailable, "no renderer could be started: %w", err)
	}

	// 3. ask
	before := r.used
	f, err := r.ask(ctx, j, most)
	if r.limit != "" {
		p.metrics.inc(rendererLimitsTotal, "limit", r.limit)
	}

	// 4. charge
	p.charge(r, t, r.used-before, err)
	return f, err
}

// left is what the namespace's account holds now. The caller holds the lock.
func (p *renderers) left(namespace string) time.Duration {
	a := p.accounts[namespace]
	if a == nil {
		return accountSize
	}
	return min(accountSize, a.left+time.Duration(accountRefill*float64(time.Since(a.at))))
}

// refusal returns why a job is not rendered now: the limit that it hit the last time, or the empty account of
// its namespace, which lets in what has been cheap before.
func (p *renderers) refusal(namespace string, key [sha256.Size]byte) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	o, left := p.outcomes[key], p.left(namespace)
	wait := time.Until(o.at.Add(o.pause))
	switch {
	case o.limit != nil && wait > 0:
		return fmt.Errorf("%w; it is tried again after %v, or when something has changed", o.limit,
			wait.Truncate(time.Second)+time.Second)
	case left > 0 || o.allowance > 0:
		return nil
	}
	a := p.accounts[namespace]
	return failuref(codes.ResourceExhausted, "rendering for namespace %q has used up its %v of processor "+
		"time, of which %v come back each minute, enough for the next try in %v; what took most, %v, is %s",
		namespace, accountSize, time.Duration(accountRefill*float64(time.Minute)),
		time.Duration(float64(-left)/accountRefill).Truncate(time.Second)+time.Second,
		a.most.Round(10*time.Millisecond), a.mostBy)
}

// obtain returns a renderer for an active ticket, and the processor time that it may have: what it has in an empty
// account, or else renderProcessorTime.
func (p *renderers) obtain(t *ticket) (_ *renderer, most time.Duration, _ error) {
	p.mu.Lock()
	if most = p.outcomes[t.key].allowance; most == 0 || p.left(t.namespace) > 0 {
		most = renderProcessorTime
	}
	var other *renderer
	sameNamespace := func(r *renderer) bool { return r.namespace == t.namespace }
	if i := slices.IndexFunc(p.idle, sameNamespace); i >= 0 {
		r := p.idle[i]
		p.idle = slices.Delete(p.idle, i, i+1)
		p.mu.Unlock()
		r.retirement.Stop()
		return r, most, nil
	} else if len(p.idle)+len(p.active) > maxRenderers { // one of the active ones is the caller
		other = p.idle[0]
		p.idle = slices.Delete(p.idle, 0, 1)
	}
	p.mu.Unlock()
	if other != nil {
		other.end()
	}
	r, err := p.start(t.namespace)
	return r, most, err
}

// charge makes a renderer idle, if it can go on, charges the namespace, and remembers the outcome.
func (p *renderers) charge(r *renderer, t *ticket, used time.Duration, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := account{most: used, mostBy: r.step}
	if old := p.accounts[t.namespace]; old != nil && old.most > used {
		a = *old
	}
	a.left, a.at = p.left(t.namespace)-used, time.Now()
	p.accounts[t.namespace] = &a
	if !r.ended {
		p.idle = append(p.idle, r)
		r.retirement = time.AfterFunc(rendererIdle, func() { p.retire(r) })
	}
	isFull := func(namespace string, _ *account) bool { return p.left(namespace) == accountSize }
	maps.DeleteFunc(p.accounts, isFull)

	switch codeOf(err) {
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable:
		return // which says nothing of the job
	}
	o := outcome{namespace: t.namespace, at: time.Now()}
	switch {
	case r.limit == "memory" || r.limit == "processor":
		o.limit, o.pause = err, min(max(2*p.outcomes[t.key].pause, minPause), maxPause)
	case !r.ended && err == nil && used <= maxAllowance:
		o.allowance = min(max(10*used, minAllowance), maxAllowance)
	}
	p.remember(t.key, o)
}

// remember keeps an outcome instead of the namespace's oldest, or the oldest of all, where there are too
// many. The caller holds the lock.
func (p *renderers) remember(key [sha256.Size]byte, o outcome) {
	delete(p.outcomes, key)
	keys := slices.Collect(maps.Keys(p.outcomes))
	full := len(keys) >= maxOutcomes
	ofOthers := func(key [sha256.Size]byte) bool { return p.outcomes[key].namespace != o.namespace }
	if own := slices.DeleteFunc(slices.Clone(keys), ofOthers); len(own) >= maxNamespaceOutcomes {
		keys, full = own, true
	}
	if full {
		older := func(a, b [sha256.Size]byte) int { return p.outcomes[a].at.Compare(p.outcomes[b].at) }
		delete(p.outcomes, slices.MinFunc(keys, older))
	}
	p.outcomes[key] = o
}

// retire ends a renderer if it is idle.
func (p *renderers) retire(r *renderer) {
	p.mu.Lock()
	i := slices.Index(p.idle, r)
	if i >= 0 {
		p.idle = slices.Delete(p.idle, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		r.end()
	}
}

// close ends the idle renderers.
func (p *renderers) close() {
	p.mu.Lock()
	idle := slices.Clone(p.idle)
	p.mu.Unlock()
	for _, r := range idle {
		p.retire(r)
	}
}

// renderer is a child process as its parent sees it. One call at a time holds it.
type renderer struct {
	namespace  string
	process    *exec.Cmd
	requests   io.WriteCloser
	answers    *bufio.Reader
	retirement *time.Timer   // while it is idle
	used       time.Duration // processor time, since its start
	step       string        // what it said last
	limit      string        // that it has hit: "memory", "processor" or "time"
	ended      bool
}

const otherNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWIPC

// confinement is a way to confine a renderer.
type confinement struct {
	name     string // tells confine which one it is
	flags    uintptr
	uid, gid int    // of the renderer outside of its user namespace
	missing  string // on Linux 5.14 and later; before, none has a limit of processes
}

// confinements are the ways to confine a renderer, best first. A kernel, or a container around this one, may
// refuse namespaces, and only root may choose another user.
var confinements = []confinement{
	{"user", unix.CLONE_NEWUSER | otherNamespaces, rendererUID, rendererUID, ""},
	{"root", otherNamespaces, 0, 0, "a user namespace, and a limit of processes"},
	{"same user", unix.CLONE_NEWUSER | otherNamespaces, os.Getuid(), os.Getgid(), "a user of its own"},
	{"bare", 0, 0, 0, "namespaces (user, mount, network, pid, ipc), an empty root directory, and a limit of " +
		"processes"},
}

// start starts a renderer, confined as well as the kernel allows, and never less than another was before: what
// fails now and then is no reason to. What is missing is logged when that is known.
func (p *renderers) start(namespace string) (*renderer, error) {
	p.mu.Lock()
	best := p.best
	p.mu.Unlock()
	var refusals []error
	for i, c := range confinements[:min(best+1, len(confinements))] {
		r, err := p.startConfined(namespace, c)
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM):
			// it was killed, or there is no room for it: nothing that less confinement helps against
			return nil, err
		case err != nil:
			refusals = append(refusals, err)
			continue
		}
		p.mu.Lock()
		better := i < p.best
		p.best = min(p.best, i)
		p.mu.Unlock()
		if better && c.missing != "" {
			p.log.Warn("renderers are less confined than they could be; other limits hold", "missing",
				c.missing, "error", errors.Join(refusals...))
		}
		return r, nil
	}
	return nil, errors.Join(refusals...)
}

// startConfined starts a renderer in one of the confinements, and waits until it is confined.
func (p *renderers) startConfined(namespace string, c confinement) (*renderer, error) {
	cmd := exec.Command(p.binary, confineArgument, c.name)
	// The last one is for programs that are linked with a C library, which reserves 64 MiB for a thread.
	cmd.Env = []string{"GOMAXPROCS=1", fmt.Sprintf("GOMEMLIMIT=%d", renderMemory*3/4), "GOTRACEBACK=none",
		"MALLOC_ARENA_MAX=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: c.flags, Setsid: true} // its kill(0) reaches nobody else
	if c.flags&unix.CLONE_NEWUSER != 0 {
		// As root of its namespace it has the capabilities to empty its root directory with, until confine
		// ends.
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: c.uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: c.gid, Size: 1}}
		cmd.SysProcAttr.GidMappingsEnableSetgroups = c.name == "user"
		cmd.SysProcAttr.Credential = &syscall.Credential{NoSetGroups: true}
	}
	requests, err := cmd.StdinPipe()
	answers, err2 := cmd.StdoutPipe()
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	r := &renderer{namespace: namespace, process: cmd, requests: requests, answers: bufio.NewReader(answers)}
	writing.Lock()
	err = cmd.Start()
	writing.Unlock()
	if err == nil {
		late := time.AfterFunc(renderTime, r.kill)
		defer late.Stop()
		kind, text, failed := readFrame(r.answers, 2*maxTextBytes)
		if failed == nil && kind == frameDone {
			return r, nil
		}
		r.end()
		err = cmp.Or(failed, errors.New(string(text)))
	}
	return nil, fmt.Errorf("confining a renderer (%s): %w", c.name, err)
}

func (r *renderer) kill() { r.process.Process.Kill() }

// end ends the process, unless it has ended by itself, and waits for it.
func (r *renderer) end() {
	r.ended = true
	r.kill()
	r.process.Wait()
}

// ask gets one volume rendered, in so much processor time at most:
//
//  1. write the request
//  2. read the answer, of which everything is checked again
//  3. note the processor time that it took, and end a renderer that does not go on
//  4. if there is no answer, say why, from the renderer's last step and from how it ended
func (r *renderer) ask(ctx context.Context, j job, most time.Duration) (files, error) {
	before := r.processorTime() // after its start, which is charged but not limited
	stop := r.watch(ctx, before, most)

	// 1. write
	r.step = "a request: reading it"
	err := j.write(r.requests)

	// 2. read
	var f files
	var failed error
	if err == nil {
		f, failed, err = r.readAnswer(j.token)
	}

	// 3. note
	killed := stop()
	if err != nil || killed != "" || r.processorTime() > lifeProcessorTime/2 {
		r.end()
	}
	r.used = r.processorTime()
	if err == nil {
		return f, failed
	}

	// 4. say why
	state := r.process.ProcessState
	switch {
	case killed == "call":
		return nil, ctx.Err()
	case killed == "processor" && most < renderProcessorTime:
		return nil, failuref(codes.ResourceExhausted, "%s takes more than the %v of processor time that it "+
			"may have while its namespace has used up its own", r.step, most)
	case killed == "processor":
		r.limit = killed
		return nil, fmt.Errorf("%s takes more than %v of processor time", r.step, renderProcessorTime)
	case killed == "time" && r.used-before < renderProcessorTime/4: // no template waits but for the processor
		return nil, failuref(codes.Unavailable, "the node is too busy: %s had %v of processor time in %v",
			r.step, r.used-before, renderTime)
	case killed == "time":
		r.limit = killed
		return nil, fmt.Errorf("%s takes more than %v", r.step, renderTime)
	case state.ExitCode() == 2: // Go's own, after a fatal error
		r.limit = "memory"
		return nil, fmt.Errorf("%s takes more than %d MiB of memory", r.step, renderMemory>>20)
	}
	return nil, failuref(codes.Unavailable, "the renderer ended (%v, %v); its last step was %s", state, err,
		r.step)
}

// watch kills the process when ctx ends, or when it takes more time than it may, counting processor time from
// what it had used before. What it returns ends that, and says why it was killed, if it was: "call", "time" or
// "processor".
func (r *renderer) watch(ctx context.Context, before, most time.Duration) (stop func() (killed string)) {
	stopped, killed := make(chan struct{}), make(chan string, 1)
	pid := r.process.Process.Pid
	go func() {
		tick, late := time.NewTicker(most/10), time.NewTimer(renderTime)
		defer tick.Stop()
		defer late.Stop()
		reason := ""
		for reason == "" {
			select {
			case <-stopped:
				killed <- ""
				return
			case <-ctx.Done():
				reason = "call"
			case <-late.C:
				reason = "time"
			case <-tick.C:
				if used, err := processorClock(pid); err == nil && used-before > most {
					reason = "processor"
				}
			}
		}
		r.kill()
		killed <- reason
	}()
	return func() string {
		close(stopped)
		return <-killed
	}
}

// processorTime is what the process has used since its start.
func (r *renderer) processorTime() time.Duration {
	if r.ended {
		return r.process.ProcessState.UserTime() + r.process.ProcessState.SystemTime()
	}
	used, err := processorClock(r.process.Process.Pid)
	if err != nil {
		return r.used
	}
	return used
}

// processorClock reads the processor time of a process that nobody has waited for: clock_getcpuclockid(3).
func processorClock(pid int) (time.Duration, error) {
	var t unix.Timespec
	err := unix.ClockGettime(int32(^pid<<3|2), &t)
	return time.Duration(t.Nano()), err
}

// readAnswer reads the files of a volume, or the failure that the renderer reports. An error means that the
// answer is none.
func (r *renderer) readAnswer(token string) (_ files, failure, err error) {
	out := &volumeFiles{files: files{}}
	name := ""
	for {
		kind, content, err := readFrame(r.answers, maxVolumeBytes)
		if err != nil {
			return nil, nil, err
		}
		switch kind {
		case frameStep:
			r.step = plainText(content, token)
		case frameName:
			name = string(content)
		case frameContent:
			if checkFileName(name) != nil {
				return nil, nil, errors.New("a file name that is not allowed") // which may hold anything
			}
			err = out.add(name, content)
		case frameDone:
			return out.files, nil, nil
		case frameFailure:
			return nil, errors.New(plainText(content, token)), nil
		case framePodFailure:
			return nil, podError(errors.New(plainText(content, token))), nil
		default:
			err = fmt.Errorf("unexpected frame %q", kind)
		}
		if err != nil {
			return nil, nil, err
		}
	}
}

// plainText makes a text of what a renderer says: not too long, without the token, valid UTF-8. A renderer that
// is what it should be says nothing with the token, which is never empty.
func plainText(said []byte, token string) string {
	return strings.ToValidUTF8(cut(strings.ReplaceAll(string(said), token, "TOKEN"), maxTextBytes), "?")
}

// A frame is a kind, a length in four bytes, and as many bytes. A request is a frameJob, whose JSON says how
// many frameObjects follow it; an answer is a frameStep for each thing that the renderer is about to do, in
// case it does not come back, pairs of frameName and frameContent, and then a frameDone, a frameFailure or a
// framePodFailure. A renderer begins with a frameDone, or with a frameFailure.
const (
	frameJob        = 'J'
	frameObject     = 'O'
	frameStep       = 'S'
	frameName       = 'N'
	frameContent    = 'C'
	frameDone       = 'D'
	frameFailure    = 'F'
	framePodFailure = 'P'

	maxTextBytes  = 2000                   // of a step or a failure
	maxFrameBytes = maxObjectBytes + 1<<20 // of a request
)

func writeFrame(w io.Writer, kind byte, content []byte) error {
	header := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(content)))
	if _, err := w.Write(header); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

// readFrame reads a frame with a content of at most limit bytes.
func readFrame(r io.Reader, limit int) (kind byte, content []byte, err error) {
	var header [5]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	length := binary.BigEndian.Uint32(header[1:])
	if int64(length) > int64(limit) {
		return 0, nil, fmt.Errorf("a frame of %d bytes", length)
	}
	content = make([]byte, length)
	_, err = io.ReadFull(r, content)
	return header[0], content, err
}

// jobHeader is the first frame of a request.
type jobHeader struct {
	selection
	Objects []string // that follow: what messages call each
	Mounted [][2]int // of them: the Connectors of the volume, each with its class
	Token   string
}

// write sends the job to a renderer, each object once.
func (j job) write(w io.Writer) error {
	h := jobHeader{selection: j.selection, Token: j.token}
	var objects []*apiObject
	add := func(o *apiObject, name string) (index int) {
		if i := slices.Index(objects, o); i >= 0 {
			return i
		}
		objects, h.Objects = append(objects, o), append(h.Objects, name)
		return len(objects) - 1
	}
	for _, s := range j.sources {
		h.Mounted = append(h.Mounted, [2]int{
			add(s.connector, fmt.Sprintf("Connector %q", s.connector.namespace+"/"+s.connector.name)),
			add(s.class, fmt.Sprintf("ConnectorClass %q", s.class.name)),
		})
	}
	header, err := json.Marshal(h)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(w) // which keeps its first error
	writeFrame(out, frameJob, header)
	for _, o := range objects {
		writeFrame(out, frameObject, o.raw)
	}
	return out.Flush()
}

// confine is the first half of a renderer's life:
//
//  1. set the limits that can be set here: they are the kernel's, and nothing of what follows is without them
//  2. replace the root directory by an empty one, and move into a chroot there, from which user_namespaces(7)
//     cannot be created
//  3. give up the user, where the user namespace has not done it, and all capabilities
//  4. execute this program again: of all threads only this one is left then, with what it has given up
//
// It returns only if one of them fails.
func confine(name string) error {
	runtime.LockOSThread()
	self, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /proc/self/exe: %w", err)
	}
	status, err := unix.Open("/proc/self/status", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /proc/self/status: %w", err)
	}
	// Whoever started the driver may have left it descriptors that are inherited.
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close_range: %w", err)
	}

	// 1. limits
	if err := setLimits(name); err != nil {
		return err
	}

	// 2. root directory
	if name != "bare" {
		if err := emptyRoot(); err != nil {
			return err
		}
	}

	// 3. user and capabilities
	if err := dropPrivileges(name); err != nil {
		return err
	}

	// 4. execute. There is no path to the file any more.
	if err := unix.Dup3(status, statusDescriptor, 0); err != nil {
		return fmt.Errorf("dup3: %w", err)
	}
	arguments, err := syscall.SlicePtrFromStrings([]string{driverName, serveArgument})
	environment, err2 := syscall.SlicePtrFromStrings(os.Environ())
	if err := errors.Join(err, err2); err != nil {
		return err
	}
	noPath := []byte{0}
	_, _, errno := unix.Syscall6(unix.SYS_EXECVEAT, uintptr(self), uintptr(unsafe.Pointer(&noPath[0])),
		uintptr(unsafe.Pointer(&arguments[0])), uintptr(unsafe.Pointer(&environment[0])),
		unix.AT_EMPTY_PATH, 0)
	return fmt.Errorf("execveat: %w", errno)
}

// setLimits sets the limits of this process, which hold for what it executes as well, and makes it the one
// that yields to all others.
func setLimits(name string) error {
	limits := map[int]uint64{
		unix.RLIMIT_CPU:     uint64(lifeProcessorTime / time.Second),
		unix.RLIMIT_FSIZE:   0,
		unix.RLIMIT_NOFILE:  statusDescriptor + 1,
		unix.RLIMIT_STACK:   1 << 20, // of the first thread; a C library has it for all others
		unix.RLIMIT_CORE:    0,
		unix.RLIMIT_MEMLOCK: 0,
	}
	if countsProcesses(name) {
		limits[unix.RLIMIT_NPROC] = rendererThreads
	}
	for resource, most := range limits {
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: most, Max: most}); err != nil {
			return fmt.Errorf("setrlimit %d: %w", resource, err)
		}
	}
	// These are kindness, not limits.
	unix.Setpriority(unix.PRIO_PROCESS, 0, 19)
	const ioprioWhoProcess, ioprioIdle = 1, 3 << 13 // ioprio_set(2)
	unix.Syscall(unix.SYS_IOPRIO_SET, ioprioWhoProcess, 0, ioprioIdle)
	os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0)
	return nil
}

// countsProcesses reports whether RLIMIT_NPROC is about this renderer's threads and processes alone: before
// Linux 5.14 it counts all those of the user on the node, and so it does without a user namespace.
func countsProcesses(name string) bool {
	if name != "user" && name != "same user" {
		return false
	}
	var linux unix.Utsname
	var major, minor int
	unix.Uname(&linux)
	fmt.Sscanf(unix.ByteSliceToString(linux.Release[:]), "%d.%d", &major, &minor)
	return major > 5 || major == 5 && minor >= 14
}

// emptyRoot makes an empty directory that cannot be written the root directory, and forgets the old one.
func emptyRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make / private: %w", err)
	}
	root, err := newTmpfs()
	if err != nil {
		return err
	}
	if err := unix.Mkdirat(root, "empty", 0o555); err != nil {
		return fmt.Errorf("mkdir: %w", err)
	}
	if err := setReadOnly(root, true); err != nil {
		return err
	}
	// It has to be mounted somewhere to become the root directory: over /proc, which is always there.
	if err := unix.MoveMount(root, "", unix.AT_FDCWD, "/proc", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("fchdir: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("umount the old root: %w", err)
	}
	if err := errors.Join(unix.Chroot("/empty"), unix.Chdir("/"), unix.Close(root)); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return nil
}

// dropPrivileges gives up, for this thread, every capability for ever, the groups, and the user root, which
// is none of the node's where there is a user namespace.
func dropPrivileges(name string) error {
	for capability := range uintptr(64) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, capability, 0, 0, 0)
		if err != nil && !errors.Is(err, unix.EINVAL) && (name == "user" || name == "root") {
			return fmt.Errorf("drop capability %d: %w", capability, err)
		}
	}
	// The system calls, since Go's own functions would change all threads, which are about to end.
	const id = rendererUID
	for _, call := range [][4]uintptr{{unix.SYS_SETGROUPS}, {unix.SYS_SETRESGID, id, id, id},
		{unix.SYS_SETRESUID, id, id, id}} {
		if name == "user" && call[0] != unix.SYS_SETGROUPS {
			continue
		}
		_, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3])
		// the others need not be allowed to
		if errno != 0 && (name == "user" || name == "root") {
			return fmt.Errorf("change user and groups: %w", errno)
		}
	}
	none := [2]unix.CapUserData{}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("capset: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

// rendererMain is what a process does that was started as a renderer; the first argument says with which
// half.
func rendererMain(arguments []string) (exitCode int) {
	var err error
	if arguments[0] == confineArgument {
		err = confine(arguments[len(arguments)-1])
	} else if err = limitMemory(); err == nil {
		return serveJobs(os.Stdin, os.Stdout)
	}
	writeFrame(os.Stdout, frameFailure, []byte(cut(err.Error(), maxTextBytes)))
	return 1
}

// serveJobs is the second half of a renderer's life: it answers requests until the driver closes the pipe.
func serveJobs(in io.Reader, out io.Writer) (exitCode int) {
	// Nobody of the same user reads its memory, and nobody what Go prints when it dies.
	if err := errors.Join(unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0), unix.Close(2)); err != nil {
		return 1
	}
	requests, answers := bufio.NewReader(in), bufio.NewWriter(out)
	announce := func(step string) {
		writeFrame(answers, frameStep, []byte(cut(step, maxTextBytes)))
		answers.Flush()
	}
	writeFrame(answers, frameDone, nil)
	for answers.Flush() == nil {
		collectGarbage()
		kind, header, err := readFrame(requests, maxFrameBytes)
		if err != nil || kind != frameJob {
			return 1
		}
		f, err := serveJob(requests, header, announce)
		for name, content := range f {
			writeFrame(answers, frameName, []byte(name))
			writeFrame(answers, frameContent, content)
		}
		switch {
		case err == nil:
			writeFrame(answers, frameDone, nil)
		case codeOf(err) == codes.InvalidArgument:
			writeFrame(answers, framePodFailure, []byte(cut(err.Error(), maxTextBytes)))
		default:
			writeFrame(answers, frameFailure, []byte(cut(err.Error(), maxTextBytes)))
		}
	}
	return 1
}

// collectGarbage frees what is left of a large volume, so that the next one has as much memory as the first.
func collectGarbage() {
	var heap runtime.MemStats
	if runtime.ReadMemStats(&heap); heap.HeapAlloc > renderMemory/8 {
		runtime.GC()
	}
}

// limitMemory limits what this process may map beyond what it has mapped until now, which /proc/self/status
// tells: proc_pid_status(5). Each limit has what the other lacks:
//
//   - RLIMIT_DATA counts what the process can write, but not what takes the place of something reserved,
//     until the limit is passed: so it lets one last allocation through.
//   - RLIMIT_AS counts all. Go reserves its heap in arenas of 64 MiB, so this limit leaves it one more of
//     them than it has at its start. Two arenas are what a renderer's heap can have at most.
func limitMemory() error {
	file := os.NewFile(statusDescriptor, "/proc/self/status")
	defer file.Close()
	text, err := io.ReadAll(file)
	if err != nil {
		return err
	}
	for field, resource := range map[string]int{"VmData": unix.RLIMIT_DATA, "VmSize": unix.RLIMIT_AS} {
		_, after, _ := strings.Cut(string(text), "\n"+field+":")
		var kilobytes uint64
		if _, err := fmt.Sscan(after, &kilobytes); err != nil {
			return fmt.Errorf("%s in /proc/self/status: %w", field, err)
		}
		most := kilobytes<<10 + renderMemory + runtimeMemory
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: most, Max: most}); err != nil {
			return err
		}
	}
	return nil
}

// serveJob reads the objects of a job, decodes them and renders.
func serveJob(requests io.Reader, header []byte, announce func(step string)) (f files, err error) {
	defer func() {
		if cause := recover(); cause != nil { // a panic is no reason to end, and its text may hold anything
			f, err = nil, fmt.Errorf("rendering failed with a panic of type %T", cause)
		}
	}()
	var h jobHeader
	if err := json.Unmarshal(header, &h); err != nil {
		return nil, err
	}
	raw := make([][]byte, len(h.Objects))
	for i := range raw {
		if _, raw[i], err = readFrame(requests, maxFrameBytes); err != nil {
			return nil, err
		}
	}
	objects := make([]object, len(raw))
	for i, name := range h.Objects {
		announce(name + ": decoding it")
		value, err := decodeJSON(raw[i])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		objects[i], _ = value.(object)
		raw[i] = nil
	}
	var mounted []mountedConnector
	for _, m := range h.Mounted {
		mounted = append(mounted, mountedConnector{objects[m[0]], objects[m[1]]})
	}
	return render(mounted, h.selection, h.Token, announce)
}
