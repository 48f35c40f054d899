package tests

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
	"connectors-csi/e2e/machine"
	"connectors-csi/e2e/node"
	"connectors-csi/e2e/readme"
)

// The two policies of deploy.yaml, against somebody who has taken over a node: who has the driver's token there, and
// knows the names and uids of the Pods of other nodes, since Endpoints name them.

const (
	requestLabel = "app.kubernetes.io/name"

	firstPolicy  = "connectors-csi-token"
	secondPolicy = "connectors-csi-token-node"
)

// The policies' reasons, as the API server gives them.
var (
	deniedLabel    = denial(firstPolicy, "with the label app.kubernetes.io/name=connectors-csi")
	deniedBound    = denial(firstPolicy, "that are bound to a Pod, named with its uid")
	deniedLifetime = denial(firstPolicy, "for 86400 seconds (24h) at most, and not for 3607")
	deniedDriver   = denial(firstPolicy, "with a token that is bound to one of its own Pods, connectors-csi-…")
	deniedNoNode   = denial(secondPolicy, "with a token that names its node, and this API server puts none into them")
	deniedNode     = denial(secondPolicy, "for Pods of its own node")
)

func denial(policy, only string) string {
	return denialBy(policy) + "the driver may request tokens only " + only
}

func denialBy(policy string) string {
	return fmt.Sprintf("ValidatingAdmissionPolicy '%[1]s' with binding '%[1]s' denied request: ", policy)
}

// clientWith makes a client of the API server with a token. Everything is sent in JSON, or in another format.
func clientWith(t *testing.T, token, contentType string) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(&rest.Config{
		Host: "https://" + node.IP, BearerToken: token, QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAFile: theNode.Path("apiserver.crt")},
		ContentConfig:   rest.ContentConfig{ContentType: contentType},
	})
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func admin(t *testing.T) *kubernetes.Clientset {
	t.Helper()
	found := regexp.MustCompile(`token: "(.*)"`).FindStringSubmatch(readFile(t, theNode.Path("admin.kubeconfig")))
	if found == nil {
		t.Fatal("the administrator has no token")
	}
	return clientWith(t, found[1], "")
}

// stolenToken is the driver's own, as root of the node can read it.
func stolenToken(t *testing.T) string {
	t.Helper()
	tokens, err := filepath.Glob(cluster.KubeletPods + driverPod(t,
		".metadata.uid") + "/volumes/kubernetes.io~projected/*/token")
	if err != nil || len(tokens) != 1 {
		t.Fatalf("the driver's token: %q, %v", tokens, err)
	}
	return readFile(t, tokens[0])
}

// barePod creates a Pod without volumes. It is on the node "elsewhere", which has no kubelet, or on none.
func (ns namespace) barePod(name, serviceAccount string, scheduled bool) *core.Pod {
	ns.Helper()
	where := "nodeName: elsewhere"
	if !scheduled {
		where = "schedulingGates: [{name: example.com/never}]"
	}
	ns.apply(fmt.Sprintf(`
apiVersion: v1
kind: Pod
metadata: {name: %s}
spec:
  serviceAccountName: %s
  terminationGracePeriodSeconds: 0
  %s
  containers: [{name: main, image: %s}]
`, name, serviceAccount, where, image.Client))
	ns.Cleanup(func() { cluster.Kubectl("--namespace", ns.name, "delete", "pod", name, "--ignore-not-found") })
	return ns.get(name)
}

func (ns namespace) get(pod string) *core.Pod {
	ns.Helper()
	got, err := admin(ns.T).CoreV1().Pods(ns.name).Get(context.Background(), pod, meta.GetOptions{})
	if err != nil {
		ns.Fatal(err)
	}
	return got
}

// elsewhere creates another node, where Pods can be said to run, and returns the token of a driver there. The DaemonSet
// stays away from it, so that the driver is not waited for.
func elsewhere(t *testing.T) (token string) {
	t.Helper()
	const manifest = "{apiVersion: v1, kind: Node, metadata: {name: elsewhere, labels: {type: virtual-kubelet}}}"
	if _, err := cluster.KubectlStdin(manifest, "apply", "-f", "-"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cluster.Kubectl("delete", "node", "elsewhere", "--ignore-not-found") })
	return boundToken(t, driverNamespace(t).barePod("connectors-csi-elsewhere", "connectors-csi", true))
}

// boundToken is what kubelet would have made for the Pod.
func boundToken(t *testing.T, pod *core.Pod) string {
	t.Helper()
	status, err := cluster.RequestBoundToken(context.Background(), admin(t), pod, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return status.Token
}

// ask requests a token of the Pod's ServiceAccount as the driver does, but for changes.
func ask(client kubernetes.Interface, pod *core.Pod, changes ...requestChange) error {
	seconds := int64(3600)
	r := &request{TokenRequest: authentication.TokenRequest{
		ObjectMeta: meta.ObjectMeta{Labels: map[string]string{requestLabel: "connectors-csi"}},
		Spec:       authentication.TokenRequestSpec{ExpirationSeconds: &seconds},
	}}
	for _, change := range append([]requestChange{boundTo("v1", "Pod", pod.Name, string(pod.UID))}, changes...) {
		change(r)
	}
	accounts := client.CoreV1().ServiceAccounts(pod.Namespace)
	_, err := accounts.CreateToken(context.Background(), pod.Spec.ServiceAccountName, &r.TokenRequest, r.options)
	return err
}

// request is one for a token.
type request struct {
	authentication.TokenRequest
	options meta.CreateOptions
}

type requestChange func(*request)

func label(labels map[string]string) requestChange { return func(r *request) { r.Labels = labels } }

func lifetime(d time.Duration) requestChange {
	return func(r *request) { *r.Spec.ExpirationSeconds = int64(d.Seconds()) }
}

func boundTo(apiVersion, kind, name, uid string) requestChange {
	return func(r *request) {
		r.Spec.BoundObjectRef = &authentication.BoundObjectReference{
			APIVersion: apiVersion, Kind: kind, Name: name, UID: types.UID(uid),
		}
	}
}

func asIs(*request) {}

func dryRun(r *request) { r.options.DryRun = []string{meta.DryRunAll} }

// policiesOf returns those of a deploy.yaml, with their bindings.
func policiesOf(manifest string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(manifest, "\n---\n"), func(object string) bool {
		return !strings.Contains(object, "kind: ValidatingAdmissionPolicy")
	}), "\n---\n")
}

func TestDriversTokenIsGoodForThePodsOfItsNodeOnly(t *testing.T) {
	ns := begin(t)
	ns.target("rights", map[string]string{"token": "{{ .context.token }}"})
	ns.pod("own", `{connector.name: target, configuration.names: config, token.expiration: 1h}`)
	ns.running("own") // so the driver's own request is granted
	there, stolen := elsewhere(t), stolenToken(t)
	driver, other := driverNamespace(t), newNamespace(t)
	own, away, waiting := ns.get("own"), ns.barePod("away", "default", true), ns.barePod("waiting", "default", false)
	foreign := other.barePod("away", "default", true)
	deleted := ns.barePod("again", "default", true)
	ns.deletePod("again")
	again := ns.barePod("again", "default", true)
	ns.kubectl("create", "secret", "generic", "secret")
	secretUID := ns.kubectl("get", "secret", "secret", "--output=jsonpath={.metadata.uid}")
	nodeUID := ns.kubectl("get", "node", node.Name, "--output=jsonpath={.metadata.uid}")
	ownDriver := driver.get(driverPod(t, ".metadata.name"))

	tokens := map[string]string{
		"stolen": stolen,
		"there":  there,
		// A Pod that is on no node: the token names its Pod, but no node.
		"waiting":  boundToken(t, driver.barePod("connectors-csi-waiting", "connectors-csi", false)),
		"stranger": boundToken(t, driver.barePod("stranger", "connectors-csi", true)),
		"unbound":  driver.kubectl("create", "token", "connectors-csi"),
	}
	if token, err := cluster.Kubectl("--namespace", driver.name, "create", "token", "connectors-csi",
		"--bound-object-kind=Node",
		"--bound-object-name="+node.Name); err == nil { // since 1.31
		tokens["node"] = token
	}
	const (
		nobody      = "6f4f6e2c-7a0b-4f0e-9d39-0d6b6f1d2c11"
		recordedUID = "does not match the UID in record" // the API server itself says so
	)
	attacks := []struct {
		as     string
		pod    *core.Pod
		denied string // empty if it is granted
		change requestChange
	}{
		// What the policies are for.
		{"stolen", own, "", asIs},
		{"stolen", away, deniedNode, asIs},
		{"stolen", waiting, deniedNode, asIs},
		{"there", away, "", asIs},
		{"there", own, deniedNode, asIs},
		{"stolen", foreign, deniedNode, asIs},
		// The driver elsewhere is a Pod like others: its token would be good for the Pods there.
		{"stolen", driver.get("connectors-csi-elsewhere"), deniedNode, asIs},
		{"stolen", ownDriver, "", asIs},
		// Whose token it is. Both policies deny one that is bound to nothing.
		{"unbound", own, "the driver may request tokens only with a token that ", asIs},
		{"unbound", waiting, "the driver may request tokens only with a token that ", asIs},
		{"waiting", own, deniedNoNode, asIs},
		{"waiting", waiting, deniedNoNode, asIs}, // no node is not the same as no node
		{"stranger", away, deniedDriver, asIs},
		{"node", own, deniedDriver, asIs},
		// The label, without which the second policy is not asked.
		{"stolen", own, deniedLabel, label(nil)},
		{"stolen", away, deniedLabel, label(nil)},
		{"stolen", away, deniedLabel, label(map[string]string{requestLabel: ""})},
		{"stolen", away, deniedLabel, label(map[string]string{requestLabel: "Connectors-CSI"})},
		{"stolen", away, deniedLabel, label(map[string]string{requestLabel: "connectors-csi-2"})},
		{"stolen", away, deniedLabel, label(map[string]string{"App.kubernetes.io/name": "connectors-csi"})},
		{"stolen", away, deniedLabel, func(r *request) {
			r.Labels, r.Annotations = nil, map[string]string{requestLabel: "connectors-csi"}
		}},
		{"stolen", away, deniedNode, label(map[string]string{requestLabel: "connectors-csi", "more": "labels"})},
		// What it is bound to.
		{"stolen", own, deniedBound, func(r *request) { r.Spec.BoundObjectRef = nil }},
		{"stolen", own, deniedBound, boundTo("v1", "Pod", "own", "")},
		{"stolen", away, deniedBound, boundTo("v1", "Pod", "away", "")},
		{"stolen", own, deniedBound, boundTo("v1", "pod", "own", string(own.UID))},
		{"stolen", own, deniedBound, boundTo("v1", "", "own", string(own.UID))},
		{"stolen", own, deniedBound, boundTo("v1", "Secret", "secret", secretUID)},
		{"stolen", own, deniedBound, boundTo("v1", "Node", node.Name, nodeUID)},
		{"stolen", own, deniedBound, func(r *request) {
			boundTo("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "hook", string(own.UID))(r)
			r.Spec.Audiences = []string{"hook"}
			r.Spec.Attestations = map[string]authentication.AttestationValue{"admissionReviewAPIGroups": {"apps"}}
		}},
		{"stolen", away, deniedNode, boundTo("", "Pod", "away", string(away.UID))},
		{"stolen", away, deniedNode, boundTo("v9", "Pod", "away", string(away.UID))},
		{"stolen", away, deniedNode, boundTo("apps/v1", "Pod", "away", string(away.UID))},
		{"stolen", away, recordedUID, boundTo("v1", "Pod", "away", nobody)},
		{"stolen", away, recordedUID, boundTo("v1", "Pod", "away", string(own.UID))},
		{"stolen", own, deniedNode, boundTo("v1", "Pod", "own", string(away.UID))},
		{"stolen", away, recordedUID, boundTo("v1", "Pod", "away", strings.ToUpper(string(away.UID)))},
		{"stolen", away, recordedUID, boundTo("v1", "Pod", "away", " "+string(away.UID))},
		{"stolen", away, recordedUID, boundTo("v1", "Pod", "away", string(away.UID)+"\x00")},
		// One Pod after another of the same name.
		{"stolen", again, recordedUID, boundTo("v1", "Pod", "again", string(deleted.UID))},
		{"stolen", again, deniedNode, asIs},
		// For how long.
		{"stolen", own, "", lifetime(24 * time.Hour)},
		{"stolen", own, "", lifetime(3606 * time.Second)},
		{"stolen", own, deniedLifetime, lifetime(24*time.Hour + time.Second)},
		{"stolen", own, deniedLifetime, lifetime(48 * time.Hour)},
		{"stolen", own, deniedLifetime, lifetime(3607 * time.Second)},
		{"there", away, deniedLifetime, lifetime(48 * time.Hour)},
	}
	for format, contentType := range sorted(map[string]string{"JSON": "",
		"protobuf": "application/vnd.kubernetes.protobuf"}) {
		for how, change := range sorted(map[string]requestChange{"": asIs, "a dry run": dryRun}) {
			for i, a := range attacks {
				if tokens[a.as] == "" {
					continue // this release makes none
				}
				err := answered(ask(clientWith(t, tokens[a.as], contentType), a.pod, a.change, change), a.denied)
				if err != nil {
					t.Errorf("%s %s, attack %d with the token %q for Pod %s/%s: %v",
						format, how, i, a.as, a.pod.Namespace, a.pod.Name, err)
				}
			}
		}
	}

	// Where nothing is to compare with, nothing is granted.
	empty := newNamespace(t)
	moved := away.DeepCopy()
	moved.Namespace = empty.name
	const noPods = "failed to configure binding: no params found"
	if err := answered(ask(clientWith(t, stolen, ""), moved), denialBy(secondPolicy)+noPods); err != nil {
		t.Errorf("in a namespace without Pods: %v", err)
	}
	// The driver's token reads none of what names a uid. Kubelet's reads Endpoints, and before 1.32 all Pods.
	may := func(kubeconfig, verb, resource string) bool {
		_, err := cluster.Kubectl("--kubeconfig", kubeconfig, "get", resource, "--all-namespaces="+fmt.Sprint(verb == "list"))
		if err != nil && !strings.Contains(err.Error(), "forbidden") {
			t.Error(err)
		}
		return err == nil
	}
	release := os.Getenv(cluster.EnvRelease)
	for _, c := range []struct {
		verb, resource string
		kubelets       bool
	}{{"list", "pods", release != "" && release < "1.32"}, {"get", "endpoints/kubernetes", true},
		{"list", "endpoints", false},
		{"list", "endpointslices", false}, {"list", "events", false}, {"list", "secrets", false}} {
		if may(kubeconfig(t, "stolen", stolen), c.verb, c.resource) {
			t.Errorf("the driver's token lets one %s %s", c.verb, c.resource)
		}
		if may(theNode.Path("kubelet.kubeconfig"), c.verb, c.resource) != c.kubelets {
			t.Errorf("kubelet's token lets one %s %s: %v", c.verb, c.resource, !c.kubelets)
		}
	}
}

// What no client library would send: the API server must not read a request in two ways.
func TestTokenPoliciesSeeWhatTheAPIServerReads(t *testing.T) {
	ns := begin(t)
	ns.pod("own", mountTarget) // it never runs, but is on the node
	ns.kubectl("wait", "--for=jsonpath={.spec.nodeName}="+node.Name, "pod/own", "--timeout=60s")
	elsewhere(t)
	own, away := ns.get("own"), ns.barePod("away", "default", true)
	client := clientWith(t, stolenToken(t), "").CoreV1().RESTClient()
	const labels = `"labels": {"app.kubernetes.io/name": "connectors-csi"}`
	request := func(pod *core.Pod, change ...string) string {
		body := fmt.Sprintf(`{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "metadata": {%s},
			"spec": {"expirationSeconds": 3600, "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": %q, "uid": %q}}}`,
			labels, pod.Name, pod.UID)
		return strings.NewReplacer(change...).Replace(body)
	}
	uid := func(pod *core.Pod) string { return fmt.Sprintf(`"uid": %q`, pod.UID) }
	send := func(method, suffix, contentType, body string) (int, string) {
		answer := client.Verb(method).RequestURI("/api/v1/namespaces/"+ns.name+"/serviceaccounts/default/token"+suffix).
			SetHeader("Content-Type", contentType).Body([]byte(body)).Do(context.Background())
		var code int
		text, _ := answer.StatusCode(&code).Raw() // the error says less
		return code, string(text)
	}
	const asJSON, asYAML = "application/json", "application/yaml"
	ns.eventually(func() error {
		if code, text := send("POST", "", asJSON, request(own)); code != http.StatusCreated {
			return fmt.Errorf("the node's own Pod: %d", code) // the text may hold a token
		} else if !strings.Contains(text, `"token":`) {
			return fmt.Errorf("the node's own Pod gets no token")
		}
		return nil
	})
	ns.eventually(func() error {
		code, text := send("POST", "", asJSON, request(away))
		if code == http.StatusCreated {
			return errors.New("the other node's Pod gets a token")
		}
		return answered(errors.New(text), deniedNode)
	})
	for name, a := range sorted(map[string]struct{ method, suffix, contentType, body string }{
		"as YAML":            {"POST", "", asYAML, request(away)},
		"as YAML, an anchor": {"POST", "", asYAML, request(away, `"uid": `, `"uid": &a `)},
		"other text":         {"POST", "", "text/plain", request(away)},
		"no content type":    {"POST", "", "", request(away)},
		"a query":            {"POST", "?dryRun=All&fieldValidation=Ignore&fieldManager=x", asJSON, request(away)},
		"a slash":            {"POST", "/", asJSON, request(away)},
		"two slashes":        {"POST", "//", asJSON, request(away)},
		"a name":             {"POST", "/default", asJSON, request(away)},
		"PUT":                {"PUT", "", asJSON, request(away)},
		"PATCH":              {"PATCH", "", "application/merge-patch+json", request(away)},
		"apply":              {"PATCH", "?fieldManager=x", "application/apply-patch+yaml", request(away)},
		"an older version":   {"POST", "", asJSON, request(away, "k8s.io/v1", "k8s.io/v1beta1")},
		"another kind":       {"POST", "", asJSON, request(away, "TokenRequest", "TokenReview")},
		"labels twice": {"POST", "", asJSON, request(away, labels,
			labels+`, "labels": {"app.kubernetes.io/name": "x"}`)},
		"labels twice, reversed": {"POST", "", asJSON, request(away, labels,
			`"labels": {"app.kubernetes.io/name": "x"}, `+labels)},
		"the label twice":      {"POST", "", asJSON, request(away, `-csi"}`, `-csi", "app.kubernetes.io/name": "x"}`)},
		"labels are null":      {"POST", "", asJSON, request(away, labels, labels+`, "labels": null`)},
		"metadata twice":       {"POST", "", asJSON, request(away, `"spec"`, `"metadata": {}, "spec"`)},
		"Labels":               {"POST", "", asJSON, request(away, `"labels"`, `"Labels"`)},
		"the uid twice":        {"POST", "", asJSON, request(away, uid(away), uid(own)+", "+uid(away))},
		"the uid twice, other": {"POST", "", asJSON, request(away, uid(away), uid(away)+", "+uid(own))},
		"UID":                  {"POST", "", asJSON, request(away, uid(away), uid(own)+`, "UID": "`+string(away.UID)+`"`)},
		"the reference twice": {"POST", "", asJSON, request(away, `"boundObjectRef"`,
			`"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "own", `+uid(own)+`}, "boundObjectRef"`)},
		"two documents": {"POST", "", asJSON, request(own, "own", "none") + request(away)},
	}) {
		if code, _ := send(a.method, a.suffix, a.contentType, a.body); code < 400 {
			t.Errorf("%s: the answer is %d", name, code)
		}
	}
}

// Whatever is missing or older than the rest, it is the driver that is denied, and nobody else.
func TestTokenPoliciesFailClosedForTheDriverAlone(t *testing.T) {
	ns := begin(t)
	empty := newNamespace(t)
	ns.pod("own", mountTarget)
	ns.kubectl("wait", "--for=jsonpath={.spec.nodeName}="+node.Name, "pod/own", "--timeout=60s")
	elsewhere(t)
	own, away := ns.get("own"), ns.barePod("away", "default", true)
	thief := clientWith(t, stolenToken(t), "")
	granted := func() error { return ask(thief, own) }
	labelled := func() error { return ask(thief, away) }
	unlabelled := func() error { return ask(thief, away, label(nil)) }
	othersAreGranted := func() {
		t.Helper()
		for _, in := range []namespace{ns, empty} {
			in.kubectl("create", "token", "default")
		}
		if err := ask(admin(t), own, label(nil)); err != nil {
			t.Error(err)
		}
	}
	ns.eventually(granted)
	ns.wantDenied(deniedNode, labelled)

	// A policy that is newer than its binding, which has no parameters yet.
	ns.kubectl("patch", "validatingadmissionpolicybinding", secondPolicy,
		"--type=merge", "--patch", `{"spec": {"paramRef": null}}`)
	ns.wantDenied(denialBy(secondPolicy), granted)
	othersAreGranted()
	ns.wantDenied(denialBy(secondPolicy), labelled)
	applyDriver(t)
	ns.eventually(granted)
	ns.wantDenied(deniedNode, labelled)

	// Neither is enough without the other, nor one without its binding; applied again, they are.
	for _, kind := range []string{"validatingadmissionpolicy", "validatingadmissionpolicybinding"} {
		ns.kubectl("delete", kind, secondPolicy)
		ns.eventually(labelled)
		ns.wantDenied(deniedLabel, unlabelled)
		othersAreGranted()
		applyDriver(t)
		ns.wantDenied(deniedNode, labelled)

		ns.kubectl("delete", kind, firstPolicy)
		ns.eventually(unlabelled)
		ns.wantDenied(deniedNode, labelled)
		othersAreGranted()
		applyDriver(t)
		ns.wantDenied(deniedLabel, unlabelled)
		ns.eventually(granted)
	}

	// The API server has looked at both, and has nothing to say on their expressions.
	for _, policy := range []string{firstPolicy, secondPolicy} {
		ns.eventually(func() error {
			const of = `--output=jsonpath={.metadata.generation} {.status.observedGeneration} {.status.typeChecking}`
			generation, observed, _ := strings.Cut(ns.kubectl("get", "validatingadmissionpolicy", policy, of), " ")
			if observed != generation+" {}" {
				return fmt.Errorf("%s, generation %s: %s", policy, generation, observed)
			}
			return nil
		})
	}
}

// earlierPolicy is a commit in which one policy of the same name rested on a uid that cannot be known.
const earlierPolicy = "06ca0d1"

func TestTokenPoliciesTakeThePlaceOfTheEarlierOne(t *testing.T) {
	ns := begin(t)
	ns.target("upgraded-policy", map[string]string{"token": "{{ .context.token }}"})
	elsewhere(t)
	away := ns.barePod("away", "default", true)
	thief := clientWith(t, stolenToken(t), "")
	ns.wantDenied(deniedNode, func() error { return ask(thief, away) })

	ns.kubectl("delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", secondPolicy)
	earlier, err := machine.Output("git", "-C", "..", "show", earlierPolicy+":deploy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	ns.apply(policiesOf(earlier))
	for _, labels := range []map[string]string{nil, {requestLabel: "connectors-csi"}} {
		ns.eventually(func() error { return ask(thief, away, label(labels)) })
	}

	// kubectl applies in the order of the file, in which the right comes last.
	_, right, found := strings.Cut(readFile(t, "../deploy.yaml"),
		"resources: [serviceaccounts/token]\n  verbs: [create]\n")
	if !found || policiesOf(right) != "" {
		t.Error("deploy.yaml has policies behind the right to request tokens")
	}
	applyDriver(t)
	ns.wantDenied(deniedLabel, func() error { return ask(thief, away, label(nil)) })
	ns.wantDenied(deniedNode, func() error { return ask(thief, away) })
	ns.pod("pod", `{connector.name: target, configuration.names: config, token.expiration: 1h}`)
	ns.running("pod")
}

// The narrower choice of docs/operations.md.
func TestTokenRightInSingleNamespaces(t *testing.T) {
	ns := begin(t)
	other := newNamespace(t)
	const mountForAnHour = `{connector.name: target, configuration.names: config, token.expiration: 1h}`
	ns.target("narrow", map[string]string{"token": "{{ .context.token }}"})
	other.connector("target", "narrow", "https://one.example.com")
	other.allow("default", other)
	blocks, err := readme.Blocks("docs/operations.md", "Variants")
	if err != nil {
		t.Fatal(err)
	}
	commands := ""
	for _, b := range blocks {
		if strings.Contains(b.Text, "rolebinding connectors-csi-token") {
			commands = strings.ReplaceAll(b.Text, "team-a", ns.name)
		}
	}
	if err := machine.Run("bash", "-euc", commands); err != nil || commands == "" {
		t.Fatalf("%v\n%s", err, commands)
	}
	ns.pod("pod", mountForAnHour)
	other.pod("pod", mountForAnHour)
	ns.running("pod")
	other.refused("pod", "code = PermissionDenied", "may not request a token for ServiceAccount "+other.name+"/default",
		"cannot create resource")
	// It is no more than with the wider one.
	elsewhere(t)
	thief, away := clientWith(t, stolenToken(t), ""), ns.barePod("away", "default", true)
	ns.wantDenied(deniedNode, func() error { return ask(thief, away) })
	ns.wantDenied(deniedLabel, func() error { return ask(thief, away, label(nil)) })
	installDriver(t)
	other.running("pod")
}

// Whoever applies the second policy must be allowed to get Pods, and to list them for its binding, as
// docs/operations.md says.
func TestTokenPoliciesAreAppliedByWhoMayReadPods(t *testing.T) {
	ns := begin(t)
	agent := kubeconfig(t, "agent", ns.kubectl("create", "token", "default"))
	grant := func(role, verbs, resources string) {
		ns.kubectl("create", "clusterrole", role, "--verb="+verbs, "--resource="+resources)
		ns.kubectl("create", "clusterrolebinding", role, "--clusterrole="+role, "--serviceaccount="+ns.name+":default")
		t.Cleanup(func() { cluster.Kubectl("delete", "clusterrole,clusterrolebinding", role, "--ignore-not-found") })
	}
	const group = ".admissionregistration.k8s.io"
	grant(ns.name, "*", "validatingadmissionpolicies"+group+",validatingadmissionpolicybindings"+group)
	// Under other names, and without effect on the driver: they are created anew.
	policies := strings.NewReplacer(
		"name: connectors-csi-token", "name: "+ns.name, "policyName: connectors-csi-token", "policyName: "+ns.name,
		":connectors-csi'", ":nobody'").Replace(policiesOf(readFile(t, "../deploy.yaml")))
	t.Cleanup(func() {
		for _, kind := range []string{"validatingadmissionpolicy", "validatingadmissionpolicybinding"} {
			cluster.Kubectl("delete", kind, ns.name, ns.name+"-node", "--ignore-not-found")
		}
	})
	for _, c := range []struct{ verbs, refused string }{
		{"", `must have "get" permission`}, {"get", `permission on the object referenced by paramRef`}, {"get,list", ""},
	} {
		cluster.Kubectl("delete", "clusterrole,clusterrolebinding", ns.name+"-pods", "--ignore-not-found")
		if c.verbs != "" {
			grant(ns.name+"-pods", c.verbs, "pods")
		}
		ns.eventually(func() error { // the API server may not know of the rights yet
			_, err := cluster.KubectlStdin(policies, "--kubeconfig", agent, "apply", "-f", "-")
			return answered(err, c.refused)
		})
	}
}

// Where tokens name no node, volumes that need a token request are refused, with the reason. An API server of 1.30 and
// 1.31 can be told to make such tokens.
func TestTokensWithoutANodeAreRefused(t *testing.T) {
	if release := os.Getenv(cluster.EnvRelease); release != "1.30" {
		t.Skip("from 1.32 on no API server can leave it out; the tests above have a token of a Pod that is on no node")
	}
	ns := begin(t)
	ns.target("no-node", map[string]string{"token": "{{ .context.token }}"})
	t.Cleanup(func() { freshDriver(t) }) // after the API server is as it was
	restartAPIServer(ns, "--feature-gates=ServiceAccountTokenPodNodeInfo=false")
	freshDriver(t)
	ns.pod("default", mountTarget)
	ns.pod("hour", `{connector.name: target, configuration.names: config, token.expiration: 1h}`)
	ns.running("default")
	ns.refused("hour", "code = PermissionDenied", deniedNoNode)
}
