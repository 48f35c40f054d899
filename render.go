package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"text/template/parse"

	"github.com/Masterminds/sprig/v3"
)

// object is an object of the Kubernetes API as decodeJSON returns it.
type object = map[string]any

// mountedConnector is one of the Connectors that a volume mounts, with its class.
type mountedConnector struct {
	connector, class object
}

// selection is what a Pod wants of its Connectors' classes.
type selection struct {
	configurations []string                  // by name; files of later ones replace files of earlier ones
	excluded       []string                  // file names
	params         map[string]map[string]any // by configuration, then by parameter
	builtIn        bool                      // the built-in files too
}

// podError is an error that whoever wrote the Pod can repair. Every other error of this file is one of a
// ConnectorClass or a Connector.
type podError struct{ error }

// errTooLarge is returned when the files of a volume exceed maxVolumeBytes or maxVolumeFiles.
var errTooLarge = fmt.Errorf("a volume may hold %d KiB in %d files", maxVolumeBytes>>10, maxVolumeFiles)

// render makes the files of a volume. The order decides which of two files of the same name stays:
//
//  1. the built-in files, where they are wanted
//  2. the configurations in the order of the selection; one that several classes have is rendered once for
//     each class, in the order in which the Connectors name the classes, with the Connectors of that class
//  3. the exclusions
//
// It reads nothing but its arguments. No error it returns contains the token.
func render(ctx context.Context, mounted []mountedConnector, want selection, token string) (files, error) {
	out := &volumeFiles{files: files{}}
	classes := groupByClass(mounted)

	// 1. built-in files
	if want.builtIn {
		if err := renderBuiltIn(out, mounted, classes[len(classes)-1], token); err != nil {
			return nil, err
		}
	}

	// 2. configurations
	for _, name := range want.configurations {
		found := false
		for _, group := range classes {
			for _, configuration := range configurationsOf(group[0].class, name) {
				found = true
				if err := renderConfiguration(ctx, out, group, configuration, want.params[name], token); err != nil {
					return nil, fmt.Errorf("ConnectorClass %q, configuration %q: %w", nameOf(group[0].class), name, err)
				}
			}
		}
		if !found {
			return nil, podError{unknownConfiguration(name, classes)}
		}
	}

	// 3. exclusions
	for _, name := range want.excluded {
		if _, ok := out.files[name]; !ok {
			return nil, podError{fmt.Errorf("configuration.names excludes the file %q, but the volume's files are: %s",
				name, strings.Join(slices.Sorted(maps.Keys(out.files)), ", "))}
		}
	}
	for _, name := range want.excluded {
		delete(out.files, name)
	}
	return out.files, nil
}

// groupByClass groups the Connectors by class, keeping the order in which each class came first.
func groupByClass(mounted []mountedConnector) [][]mountedConnector {
	var groups [][]mountedConnector
	for _, m := range mounted {
		i := slices.IndexFunc(groups, func(g []mountedConnector) bool { return nameOf(g[0].class) == nameOf(m.class) })
		if i < 0 {
			groups = append(groups, []mountedConnector{m})
		} else {
			groups[i] = append(groups[i], m)
		}
	}
	return groups
}

// configurationsOf returns the class's configurations of that name; the CRD does not forbid two.
func configurationsOf(class object, name string) []object {
	var found []object
	for _, c := range objectList(class, "spec", "configurations") {
		if stringAt(c, "name") == name {
			found = append(found, c)
		}
	}
	return found
}

func unknownConfiguration(name string, classes [][]mountedConnector) error {
	var known []string
	for _, group := range classes {
		var names []string
		for _, c := range objectList(group[0].class, "spec", "configurations") {
			names = append(names, stringAt(c, "name"))
		}
		known = append(known, fmt.Sprintf("ConnectorClass %q has: %s", nameOf(group[0].class), cmp.Or(strings.Join(names, ", "), "none")))
	}
	return fmt.Errorf("configuration %q of configuration.names does not exist; %s", name, strings.Join(known, "; "))
}

// renderConfiguration renders the files of one configuration of a class, with the Connectors of that class.
func renderConfiguration(ctx context.Context, out *volumeFiles, group []mountedConnector, configuration object, supplied map[string]any, token string) error {
	params, err := resolveParams(objectList(configuration, "params"), supplied)
	if err != nil {
		return podError{err}
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
		content, err := renderFile(ctx, name, text, out.room(name), func(token string) any { return templateData(group, params, token) }, token)
		if err != nil {
			return fmt.Errorf("file %q: %w%s", name, err, hintNoProxy(text, group))
		}
		if err := out.add(name, content); err != nil {
			return fmt.Errorf("file %q: %w", name, err)
		}
	}
	return nil
}

// hintNoProxy names the usual reason why a template that uses the proxy fails on a Connector created a moment ago.
func hintNoProxy(text string, group []mountedConnector) string {
	for _, m := range group {
		if strings.Contains(text, "proxy") && proxyAddress(m.connector) == "" {
			return fmt.Sprintf("; Connector %s has no proxy address yet (status.proxy.httpAddress.url): wait for the Connectors "+
				"operator to set it, or look at the class's spec.proxy and the Connector's conditions", fullName(m.connector))
		}
	}
	return ""
}

// templateData is what the templates of a class see.
func templateData(group []mountedConnector, params map[string]any, token string) map[string]any {
	var connectors []any
	for _, m := range group {
		connectors = append(connectors, connectorData(m.connector))
	}
	class := object{}
	if address := proxyAddress(group[0].class); address != "" {
		class["proxyAddress"] = address
	}
	return map[string]any{
		"connector":      connectors[0],
		"connectors":     connectors,
		"connectorclass": class,
		"configurations": deepCopy(params),
		"context":        map[string]any{"token": token, "proxy": map[string]any{"caCert": caCert(group)}},
	}
}

// connectorData is the Connector as the API server sent it, with status.proxyAddress, name and namespace. It is
// a copy all through: other volumes share the object, and sprig has functions that change their arguments.
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
func caCert(group []mountedConnector) string {
	for _, m := range slices.Backward(group) {
		if pem := stringAt(m.connector, "status", "proxy", "httpAddress", "CACerts"); pem != "" {
			return pem
		}
	}
	return stringAt(group[0].class, "status", "proxy", "httpAddress", "CACerts")
}

// proxyAudiences are the audiences that the proxies of the Connectors want in the token.
func proxyAudiences(mounted []mountedConnector) []string {
	var audiences []string
	for _, m := range mounted {
		a := cmp.Or(stringAt(m.connector, "status", "proxy", "httpAddress", "audience"), stringAt(m.class, "status", "proxy", "httpAddress", "audience"))
		if a != "" && !slices.Contains(audiences, a) {
			audiences = append(audiences, a)
		}
	}
	return audiences
}

// resolveParams checks the supplied parameters against the declared ones and adds the defaults. Parameters
// that are not declared pass through, since classes exist that use them without declaring them.
func resolveParams(declared []object, supplied map[string]any) (map[string]any, error) {
	params := map[string]any{}
	maps.Copy(params, supplied)
	for _, d := range declared {
		name, kind := stringAt(d, "name"), cmp.Or(stringAt(d, "type"), "string")
		value, ok := supplied[name]
		if !ok {
			if params[name], ok = d["default"]; !ok {
				return nil, fmt.Errorf("required configuration param %q is missing: set it in configuration.params", name)
			}
			continue
		}
		if is := kindOf(value); is != kind {
			return nil, fmt.Errorf("configuration param %q must be of type %s, not %s", name, kind, is)
		}
		allowed, _ := d["enum"].([]any)
		values, isList := value.([]any)
		if !isList {
			values = []any{value}
		}
		for _, v := range values {
			if len(allowed) > 0 && !slices.ContainsFunc(allowed, func(a any) bool { return fmt.Sprint(a) == fmt.Sprint(v) }) {
				return nil, fmt.Errorf("configuration param %q must be one of %v, not %q", name, allowed, fmt.Sprint(v))
			}
		}
	}
	return params, nil
}

// kindOf names the type of a value in the words of a class's params.
func kindOf(value any) string {
	switch value.(type) {
	case string:
		return "string"
	case []any:
		return "array"
	case object:
		return "object"
	case bool:
		return "boolean"
	}
	return "number"
}

// renderBuiltIn makes the files that the product mounts in every volume since its release 1.6. One that has
// no value, since there is no proxy or no CA, is left out. The proxy and the CA are those of the last class.
func renderBuiltIn(out *volumeFiles, mounted, lastClass []mountedConnector, token string) error {
	address := proxyAddress(lastClass[0].class)
	if len(mounted) == 1 || address == "" {
		address = cmp.Or(proxyAddress(lastClass[len(lastClass)-1].connector), address)
	}
	add := map[string]string{"context.token": token, "connector.status.proxyAddress": address}
	for _, name := range []string{"context.proxy.caCert", "ca.crt", "ca.cert"} {
		add[name] = caCert(lastClass)
	}
	if address != "" {
		proxy, err := authenticatedProxy(address, mounted, token)
		if err != nil {
			return err
		}
		add["http.proxy"], add["https.proxy"] = proxy, proxy
		add[".curlrc"] = "proxy = " + proxy + "\n"
		for _, v := range [][2]string{{"http_proxy", proxy}, {"https_proxy", proxy}, {"no_proxy", "localhost,127.0.0.1"}} {
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

// room is how many bytes the file of that name may have.
func (v *volumeFiles) room(name string) int { return maxVolumeBytes - v.bytes + len(v.files[name]) }

func (v *volumeFiles) add(name string, content []byte) error {
	if _, ok := v.files[name]; len(content) > v.room(name) || !ok && len(v.files) == maxVolumeFiles {
		return errTooLarge
	}
	v.bytes += len(content) - len(v.files[name])
	v.files[name] = content
	return nil
}

var fileName = regexp.MustCompile(`^[-._a-zA-Z0-9]+$`)

// checkFileName allows what a ConfigMap's key may be: no path, and no name that the volume's layout uses.
func checkFileName(name string) error {
	if !fileName.MatchString(name) || len(name) > 253 || name == "." || strings.HasPrefix(name, "..") {
		return fmt.Errorf("file name %q is not allowed: it must consist of 1 to 253 letters, digits, '-', '_' or '.', "+
			"must not be '.' and must not begin with '..'", name)
	}
	return nil
}

// renderFile renders one template into at most limit bytes.
//
// The text of an error may come out of the template ({{ fail .context.token }}), so an error is reported as it
// is without the token: from a second run that has a placeholder in its place.
func renderFile(ctx context.Context, name, text string, limit int, data func(token string) any, token string) ([]byte, error) {
	t, err := parseTemplate(name, text)
	if err != nil {
		return nil, err
	}
	content, err := execute(ctx, t, limit, data(token))
	if err == nil || errors.Is(err, errTooLarge) || ctx.Err() != nil {
		return content, cmp.Or(ctx.Err(), err)
	}
	if _, err := execute(ctx, t, limit, data("TOKEN")); err != nil {
		return nil, err
	}
	return nil, errors.New("the template fails because of the token's value")
}

func execute(ctx context.Context, t *template.Template, limit int, data any) ([]byte, error) {
	out := &limitedBuffer{ctx: ctx, left: limit}
	if err := t.Execute(out, data); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// limitedBuffer takes what a template writes, until there is too much of it or the time is over.
type limitedBuffer struct {
	bytes.Buffer
	ctx  context.Context
	left int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	if b.left -= len(p); b.left < 0 {
		return 0, errTooLarge
	}
	return b.Buffer.Write(p)
}

// checkValue is a function that guard puts into templates. It is added after parsing, so no template can name it.
const checkValue = "printedValue"

// functions are what templates may call: all of sprig, less what would hand the driver's environment and network
// to the author of a class.
var functions = func() template.FuncMap {
	functions := sprig.TxtFuncMap()
	for _, f := range []string{"env", "expandenv", "getHostByName"} {
		delete(functions, f)
	}
	maps.Copy(functions, printingFunctions)
	return functions
}()

// parseTemplate parses a template and puts the guards into it. It gets only the functions that its text can name,
// since each one costs more time than the search for it.
func parseTemplate(name, text string) (*template.Template, error) {
	named := template.FuncMap{}
	for f := range functions {
		if strings.Contains(text, f) {
			named[f] = functions[f]
		}
	}
	t, err := template.New(name).Funcs(named).Parse(text)
	if err != nil {
		return nil, err
	}
	t.Funcs(template.FuncMap{checkValue: func(expression string, value any) (any, error) {
		if value == nil {
			return nil, fmt.Errorf("%s has no value", expression)
		}
		return value, nil
	}})
	for _, defined := range t.Templates() {
		defined.Root = guard(defined.Root)
	}
	return t, nil
}

// printingFunctions are the functions that would print a missing value as <no value> or <nil>.
var printingFunctions = template.FuncMap{
	"print":    strict(fmt.Sprint),
	"println":  strict(fmt.Sprintln),
	"html":     strict(template.HTMLEscaper),
	"js":       strict(template.JSEscaper),
	"urlquery": strict(template.URLQueryEscaper),
	"toString": strict(fmt.Sprint),
	"printf": func(format string, args ...any) (string, error) {
		return strict(func(args ...any) string { return fmt.Sprintf(format, args...) })(args...)
	},
}

func strict(print func(...any) string) func(...any) (string, error) {
	return func(args ...any) (string, error) {
		if i := slices.Index(args, nil); i >= 0 {
			return "", fmt.Errorf("value %d to print is missing", i+1)
		}
		return print(args...), nil
	}
}

// guard rewrites a parsed template, in the way of html/template's escapers:
//
//  1. whatever an action prints goes through checkValue, so that a missing value fails the mount instead of
//     putting "<no value>" into somebody's configuration; conditions, assignments and arguments stay lenient
//  2. every list of nodes, so the body of every loop, begins with an empty text: even that is written, and the
//     writer ends an execution whose time is over
func guard(list *parse.ListNode) *parse.ListNode {
	if list == nil {
		return nil
	}
	guarded := &parse.ListNode{NodeType: parse.NodeList, Pos: list.Pos}
	guarded.Nodes = append(guarded.Nodes, &parse.TextNode{NodeType: parse.NodeText, Pos: list.Pos})
	for _, node := range list.Nodes {
		switch n := node.(type) {
		case *parse.ActionNode:
			if len(n.Pipe.Decl) == 0 {
				n.Pipe.Cmds = append(n.Pipe.Cmds, checkCommand(n))
			}
		case *parse.IfNode:
			n.List, n.ElseList = guard(n.List), guard(n.ElseList)
		case *parse.WithNode:
			n.List, n.ElseList = guard(n.List), guard(n.ElseList)
		case *parse.RangeNode:
			n.List, n.ElseList = guard(n.List), guard(n.ElseList)
		}
		guarded.Nodes = append(guarded.Nodes, node)
	}
	return guarded
}

// checkCommand is the command that checks what the action prints.
func checkCommand(n *parse.ActionNode) *parse.CommandNode {
	expression := n.String()
	return &parse.CommandNode{NodeType: parse.NodeCommand, Pos: n.Pos, Args: []parse.Node{
		parse.NewIdentifier(checkValue).SetPos(n.Pos),
		&parse.StringNode{NodeType: parse.NodeString, Pos: n.Pos, Quoted: strconv.Quote(expression), Text: expression},
	}}
}

// decodeJSON decodes one JSON value as the Kubernetes API means it: a null in an object is the same as a
// missing field, whole numbers are int64 (template functions print and compare them as such).
func decodeJSON(data []byte) (any, error) {
	decoder := json.NewDecoder(bytes.NewReader(data))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON value")
	}
	return normalize(value), nil
}

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
	switch v := value.(type) {
	case object:
		c := make(object, len(v))
		for key, field := range v {
			c[key] = deepCopy(field)
		}
		return c
	case []any:
		c := make([]any, len(v))
		for i := range v {
			c[i] = deepCopy(v[i])
		}
		return c
	}
	return value
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
