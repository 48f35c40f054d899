package main

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// ---- Refresh and tokens ----

func TestUnchangedRepublishAsksNobody(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	v := n.volume()
	v.settle()
	asked, wantUnchanged := n.api.countFromNow(""), v.unchangedFromNow()
	for range 5 {
		v.mustPublish()
	}
	if asked() != 0 {
		t.Errorf("%d requests within the refresh interval", asked())
	}
	n.age()
	v.mustPublish()
	if got := asked(); got != 2 {
		t.Errorf("%d requests after it, for a Connector and a class", got)
	}
	wantUnchanged()
}

// The volumes of a node share what is read: once for each Connector and ServiceAccount, once for each class.
func TestReadsAreShared(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	n.api.put(connector("default", "other", "git"))
	var volumes []*podVolume
	for range 10 {
		volumes = append(volumes, n.volume(), n.volume(attrs{"connector.name": "other"}))
	}
	volumes = append(volumes, n.pod("default/builder").volume("config"))
	for _, v := range volumes {
		v.mustPublish()
	}
	git, other, gitClass := connectorPath("default", "git"), connectorPath("default", "other"), classPath("git")
	before := map[string]int{git: n.api.count(git), other: n.api.count(other), gitClass: n.api.count(gitClass)}

	n.age()
	gate := n.api.hold("/connectors/")
	results := publishAtOnce(volumes)
	n.awaitCalls(len(volumes))
	gate.await(3, "each Connector is asked for, by each ServiceAccount")
	gate.open()
	for range volumes {
		must(t, <-results)
	}
	for path, want := range sorted(map[string]int{git: 2, other: 1, gitClass: 1}) {
		if got := n.api.count(path) - before[path]; got != want {
			t.Errorf("%d requests for %s, not %d", got, path, want)
		}
	}
}

// A read that fails fails for all who wait for it; those who came while it was under way share the next one.
func TestReadsThatFailAreShared(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	var volumes []*podVolume
	for range 10 {
		volumes = append(volumes, n.volume())
		volumes[len(volumes)-1].settle()
	}
	path := connectorPath("default", "git")
	n.api.remove(path)
	n.age()
	asked, gate := n.api.countFromNow(path), n.api.hold("/connectors/")
	results := publishAtOnce(volumes)
	n.awaitCalls(len(volumes))
	gate.await(1, "one asks")
	gate.open()
	for range volumes {
		wantError(t, <-results, codes.NotFound, `Connector "default/git" not found`)
	}
	if got := asked(); got > 2 {
		t.Errorf("%d requests", got)
	}
	n.api.put(connector("default", "git", "git"))
	for _, v := range volumes {
		v.want("token", v.pod.token)
		v.mustPublish()
	}
}

// padded makes a Connector larger by so many bytes.
func padded(bytes int) func(object) { return with(strings.Repeat("x", bytes), "spec", "padding") }

func TestObjectsOfAVolumeAreLimited(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	large := gitClassOf("token", "x", "padding", "{{/*"+strings.Repeat("x", 100<<10)+"*/}}")
	n.api.put(large)
	var names []string
	for i := range 5 {
		name := fmt.Sprintf("large-%d", i)
		n.api.put(connector("default", name, "git", padded(1<<20-20_000)))
		names = append(names, name)
	}
	paths := []string{classPath("git")}
	for _, name := range names[:4] {
		paths = append(paths, connectorPath("default", name))
	}
	v := n.volume(attrs{"connector.name": "-", "connectors": strings.Join(names[:4], ",")})
	// the class counts once
	v.mustRefuse(codes.FailedPrecondition, `Connector "default/large-3"`, "more than 4096 KiB together")
	// of the four and their class
	size := func(padding int) (all int) {
		n.api.put(connector("default", "large-3", "git", padded(padding)))
		n.api.set(func() {
			for _, path := range paths {
				all += len(n.api.objects[path])
			}
		})
		return all
	}
	room := 1<<20 - 60_000
	for all := size(room); all != maxVolumeObjectsBytes; all = size(room) { // a resourceVersion may get a digit more
		room += maxVolumeObjectsBytes - all
	}
	if all := size(room + 1); all != maxVolumeObjectsBytes+1 {
		t.Fatalf("they have %d bytes", all)
	}
	v.mustRefuse(codes.FailedPrecondition, "more than 4096 KiB together")
	size(room)
	v.mustPublish()
	n.api.put(connector("default", "large-3", "git", padded(1<<20), with("https://moved", "spec", "address")))
	n.age()
	v.mustPublish() // once it is mounted, a volume goes on
	v.want("token", "x")
	n.volume(attrs{"connector.name": "-", "connectors": strings.Join(names, ",")}).mustRefuse(codes.FailedPrecondition,
		`Connector "default/large-3"`, "it has 1024 KiB", "more than 4096 KiB together")
	n.api.put(connector("default", "larger", "git", padded(3<<20)))
	n.volume(attrs{"connector.name": "larger"}).mustRefuse(codes.FailedPrecondition, `Connector "default/larger"`,
		"more than 3072 KiB")
}

// What the calls under way hold is bounded for each namespace and for all; what is beyond has to come again.
func TestObjectsUnderWayAreLimited(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.api.put(connector("team-a", "git", "git"))
	k := n.driver.kube
	hold := func(namespace string, mebibytes ...int) (lookups []*lookup) {
		for _, size := range mebibytes {
			c := k.begin(&lookup{pod: podIdentity{namespace: namespace}, first: true})
			must(t, c.charge(&entry{}, &apiObject{raw: make([]byte, size<<20)}))
			lookups = append(lookups, c)
		}
		return lookups
	}
	shared := &apiObject{raw: make([]byte, 3<<20)} // counts once
	for range 10 {
		c := k.begin(&lookup{pod: podIdentity{namespace: "default"}, first: true})
		must(t, c.charge(&entry{}, shared))
		defer c.end()
	}
	full := hold("default", 3)
	n.volume().mustRefuse(codes.ResourceExhausted, `Connector "default/git" cannot be read`, "6144 KiB",
		`namespace "default"`)
	n.pod("team-a/default").volume("config").mustPublish()
	rest := append(hold("team-b", 3, 3), hold("team-c", 3, 1)...)
	n.pod("team-a/default").volume("config").mustRefuse(codes.ResourceExhausted, "16384 KiB")
	for _, c := range rest {
		c.end()
	}
	n.pod("team-a/default").volume("config").mustPublish()
	for _, c := range full {
		c.end()
	}
	n.volume().mustPublish()
	if !maps.Equal(k.charged, map[string]int{"default": 3 << 20, "": 3 << 20}) {
		t.Errorf("%v bytes are held", k.charged)
	}
}

// The cache has each object once, whoever reads it, keeps to its limit by what was used longest ago, and has nothing
// of reads that failed.
func TestCache(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	k, volumes := n.driver.kube, []*podVolume{}
	for i := range 3 {
		n.pod(fmt.Sprintf("default/reader-%d", i)).volume("config").mustPublish()
	}
	objects := func() (by map[string]*apiObject) {
		by = map[string]*apiObject{}
		n.eachEntry(func(e *entry) {
			if e.object != nil {
				if by[e.path] != nil && by[e.path] != e.object {
					t.Errorf("readers of one version of %s have two objects", e.path)
				}
				by[e.path] = e.object
			}
		})
		return by
	}
	if readers := len(k.entries[connectorPath("default", "git")]); len(objects()) != 2 || readers != 3 {
		t.Errorf("the cache has %d objects; one has %d readers", len(objects()), readers)
	}
	for i := range 10 {
		name := fmt.Sprintf("large-%d", i)
		n.api.put(connector("default", name, "git", padded(1<<20)))
		volumes = append(volumes, n.volume(attrs{"connector.name": name}))
		volumes[i].settle()
		volumes[0].mustPublish() // so that it is not the one used longest ago
	}
	size := 0
	n.eachEntry(func(e *entry) {
		if e.object != nil {
			size += len(e.object.raw)
		}
	})
	if k.cacheBytes != size || size > 4<<20 || size < 3<<20 {
		t.Errorf("the cache has %d bytes and counts %d", size, k.cacheBytes)
	}
	has := func(name string) bool { return objects()[connectorPath("default", name)] != nil }
	if !has("large-0") || has("large-1") || !has("large-9") {
		t.Errorf("it has %v", slices.Sorted(maps.Keys(objects())))
	}
	volumes[1].mustPublish() // reads again

	had, entries := len(objects()), len(k.entries)
	for i := range 100 {
		n.volume(attrs{"connector.name": fmt.Sprintf("none-%d", i)}).mustRefuse(codes.NotFound)
	}
	if len(objects()) != had || len(k.entries) != entries {
		t.Errorf("failed reads left %d objects and %d entries", len(objects())-had, len(k.entries)-entries)
	}

	for _, v := range volumes {
		v.mustUnpublish()
	}
	n.volume().mustPublish()
	if len(k.entries) != 2 {
		t.Errorf("afterwards the cache has %v", slices.Sorted(maps.Keys(k.entries)))
	}
}

// Of two reads the one counts that began later, whichever ends first: no file goes back to an older content.
func TestSlowReadDoesNotRollBack(t *testing.T) {
	t.Parallel()
	for _, fresh := range []bool{true, false} {
		t.Run(fmt.Sprintf("the slow one is fresh: %v", fresh), func(t *testing.T) {
			n := startPolling(t)
			path, held, open := connectorPath("default", "git"), make(chan bool), make(chan bool)
			slow, quick := n.volume(), n.volume()
			if !fresh {
				slow.settle()
				n.age()
			}
			first := true
			n.api.set(func() {
				n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
					if r.URL.Path != path {
						return false
					}
					n.api.mu.Lock()
					old, slow := n.api.objects[path], first
					first = false
					n.api.mu.Unlock()
					if slow {
						close(held)
						<-open
						w.Write(old)
					}
					return slow
				}
			})
			result := make(chan error)
			go func() { result <- slow.publish() }()
			<-held
			n.api.put(connector("default", "git", "git", with("https://new", "spec", "address")))
			quick.mustPublish()
			close(open)
			must(t, <-result)
			for range 2 {
				for _, v := range []*podVolume{slow, quick} {
					if !strings.Contains(v.file(".gitconfig"), "https://new") {
						t.Errorf("the file is %q", v.file(".gitconfig"))
					}
					v.mustPublish()
				}
			}
		})
	}
}

// Callers that give up do not spoil the read for the one that waits behind them.
func TestCallersThatGiveUp(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	volumes := []*podVolume{n.volume(), n.volume(), n.volume()}
	for _, v := range volumes {
		v.settle()
	}
	n.age()
	gate := n.api.hold("/connectors/")
	results := []chan error{make(chan error), make(chan error), make(chan error)}
	for i, timeout := range []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, time.Minute} {
		go func() { results[i] <- volumes[i].publishWithin(timeout) }()
		eventually(t, "it is under way", func() bool {
			called := false
			n.eachVolume(func(v *volume) { called = called || v.called && v.target == volumes[i].target })
			return called
		})
	}
	wantError(t, <-results[0], codes.DeadlineExceeded)
	wantError(t, <-results[1], codes.DeadlineExceeded)
	gate.await(1, "the third asks itself")
	gate.open()
	must(t, <-results[2])
}

// Whether a Pod may read a Connector is the API server's decision on the Pod's own token, each time a volume is new.
func TestFirstPublishChecksThePodsOwnToken(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	git := connectorPath("default", "git")
	n.volume().mustPublish()
	if user := n.api.lastReader(git); user != "default/default" {
		t.Errorf("the Connector was read by %s", user)
	}
	if user := n.api.lastReader(classPath("git")); user != driverUser {
		t.Errorf("the class was read by %s", user)
	}

	forged := n.volume() // claims to be of a ServiceAccount whose Connector is in the cache
	parts := strings.Split(forged.pod.token, ".")
	forged.pod.token = parts[0] + "." + parts[1] + "." + sign("something else")
	forged.mustRefuse(codes.Unauthenticated, `Connector "default/git"`, "Unauthorized")

	expired := n.volume()
	expired.pod.token = issue("default", "default", map[string]string{"name": expired.pod.name, "uid": expired.pod.uid},
		-time.Minute, apiAudience)
	expired.mustRefuse(codes.Unauthenticated)

	n.api.forbid("default/builder", git)
	n.pod("default/builder").volume("config").mustRefuse(codes.PermissionDenied,
		"ServiceAccount default/builder may not read")

	v := n.volume()
	n.api.put(connector("default", "git", "git", with("https://changed", "spec", "address")))
	v.mustPublish() // and it sees the present, not the cache
	if !strings.Contains(v.file(".gitconfig"), "https://changed") {
		t.Error("a first publish was made from the cache")
	}

	// Not even what another Pod of the ServiceAccount was given since then counts.
	n.api.put(connector("default", "slow", "git"))
	gate, asked := n.api.hold("/connectors/slow"), n.api.countFromNow(git)
	published := make(chan error)
	go func() { published <- n.volume(attrs{"connector.name": "-", "connectors": "slow,git"}).publish() }()
	gate.await(1, "the first Connector is read")
	n.volume().mustPublish()
	gate.open()
	must(t, <-published)
	if got := asked(); got != 2 {
		t.Errorf("two first publishes read the Connector %d times", got)
	}
}

func TestPermissionTakenAway(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	v := n.volume()
	v.mustPublish()
	n.api.forbid("default/default", connectorPath("default", "git"))
	v.mustPublish() // the same object, the same token: nothing to do
	n.age()
	wantError(t, v.publish(), codes.PermissionDenied, "may not read")
	v.want("token", v.pod.token)
}

func TestDriversTokenIsReadAsItRotates(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.volume().mustPublish()
	n.awaitWatches(2) // one of them comes with the driver's token too
	first := n.api.lastDriverToken()
	rotated := driverToken()
	must(t, os.WriteFile(n.serviceAccount()+"/token", []byte(rotated), 0o600))
	n.volume().mustPublish()
	if first == rotated || n.api.lastDriverToken() != rotated {
		t.Error("the driver uses its old token")
	}
}

func TestKubeletsNewTokenReachesTheFile(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume()
	v.mustPublish()
	asked := n.api.countFromNow("")
	for range 3 {
		v.pod.renewToken()
		v.mustPublish()
		v.want("token", v.pod.token)
		v.wantClean()
	}
	if asked() != 0 {
		t.Error("a new token made the driver ask the API server")
	}
}

func TestOwnTokenForAnotherExpiration(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	path := tokenPath("default", "default")
	v.mustPublish()
	request := n.api.lastBody(path)
	for field, want := range sorted(map[string]any{"apiVersion": "v1", "kind": "Pod", "name": v.pod.name,
		"uid": v.pod.uid}) {
		if got := valueAt(request, "spec", "boundObjectRef", field); got != want {
			t.Errorf("boundObjectRef.%s is %v, not %v", field, got, want)
		}
	}
	if got := valueAt(request, "spec", "expirationSeconds"); got != 3600. {
		t.Errorf("expirationSeconds is %v", got)
	}
	if got := valueAt(request, "spec", "audiences"); got != nil {
		t.Errorf("audiences are %v, not the API server's default", got)
	}
	by, connectorBy := n.api.lastReader(path), n.api.lastReader(connectorPath("default", "git"))
	if by != driverUser || connectorBy != "default/default" {
		t.Errorf("requests came from %q and %q", by, connectorBy)
	}
	token := v.file("token")
	if c, ok := decodeClaims(token); !ok || token == v.pod.token || c.Kubernetes.Pod["uid"] != v.pod.uid ||
		time.Until(time.Unix(c.Expires, 0)) < 59*time.Minute {
		t.Errorf("the token in the file has the claims %+v", c)
	}
	n.volume(attrs{"token.expiration": "10m"}).mustPublish() // the shortest
}

func TestOwnTokenIsRenewedAt80Percent(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	path := tokenPath("default", "default")
	v := n.volume(attrs{"token.expiration": "1h"})
	v.mustPublish()
	token := v.file("token")
	n.age()
	v.pod.renewToken()
	v.mustPublish()
	if v.file("token") != token || n.api.count(path) != 1 {
		t.Error("a fresh token was renewed")
	}

	if at := time.Until(v.record().token.renew); at < 47*time.Minute || at > 48*time.Minute {
		t.Errorf("a token of an hour is renewed after %v", at)
	}
	v.endToken() // 48 minutes later
	v.mustPublish()
	if v.file("token") == token || n.api.count(path) != 2 {
		t.Error("an old token was not renewed")
	}
	token = v.file("token")

	v.attributes["token.expiration"] = "2h" // the API server may give less than what was asked for
	n.api.set(func() { n.api.lifetime = 20 * time.Minute })
	v.mustPublish()
	short := v.file("token")
	if short == token || n.api.count(path) != 3 {
		t.Error("another expiration did not lead to another token")
	}
	if at := time.Until(v.record().token.renew); at < 15*time.Minute || at > 16*time.Minute {
		t.Errorf("a token of 20 minutes is renewed after %v", at)
	}
	n.api.set(func() { n.api.lifetime = 0 })
	v.endToken()
	v.mustPublish()
	if v.file("token") == short || n.api.count(path) != 4 {
		t.Errorf("%d tokens were asked for", n.api.count(path))
	}
	v.wantClean()
}

// endToken makes the volume's token, which the driver asked for, due for renewal.
func (v *podVolume) endToken() {
	v.record().token.renew = time.Now()
}

// The clocks of the node and of the API server may differ as they like; the lifetime is what the answer grants.
func TestRenewalIsCountedFromTheRequest(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	for what, c := range sorted(map[string]struct{ clock, granted, renew time.Duration }{
		"25 minutes behind": {-25 * time.Minute, 0, 48 * time.Minute},
		"25 minutes ahead":  {25 * time.Minute, 0, 48 * time.Minute},
		"a day behind":      {-24 * time.Hour, 0, 48 * time.Minute},
		"years ahead":       {99999 * time.Hour, 0, 48 * time.Minute},
		"less is granted":   {-time.Hour, 20 * time.Minute, 16 * time.Minute},
		"more is granted":   {0, 300 * time.Hour, 48 * time.Minute},
		"negative":          {0, -time.Hour, 48 * time.Minute},
		"nothing is said":   {0, time.Nanosecond, 48 * time.Minute}, // as 0 seconds
	}) {
		v := n.volume(attrs{"token.expiration": "1h"})
		n.api.set(func() { n.api.clock, n.api.lifetime = c.clock, c.granted })
		v.mustPublish()
		asked := n.api.countFromNow(tokenPath("default", "default"))
		v.mustPublish()
		if at := time.Until(v.record().token.renew); at > c.renew || at < c.renew-time.Minute || asked() != 0 {
			t.Errorf("%s: the token is renewed after %v, not %v", what, at, c.renew)
		}
	}
	v := n.volume(attrs{"token.expiration": "24h"})
	n.api.set(func() { n.api.clock, n.api.lifetime = 0, 0 })
	v.mustPublish()
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 86400. {
		t.Errorf("expirationSeconds is %v", got)
	}
}

func TestRenewalThatFailsKeepsTheToken(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.volume(attrs{"token.expiration": "1h"})
	v.mustPublish()
	token := v.file("token")
	v.endToken()
	n.api.set(func() { n.api.noTokens = true })
	wantError(t, v.publish(), codes.PermissionDenied, "connectors-csi-token")
	v.want("token", token)
	n.api.set(func() { n.api.noTokens = false })
	v.mustPublish()
	if v.file("token") == token {
		t.Error("the token was not renewed")
	}
}

func TestAudience(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	proxy := []string{"status", "proxy", "httpAddress", "audience"}
	git, other := gitClass(), class("other", configuration("config", "other", "x"))
	with("http://c-git", "spec", "proxy", "audience")(git)
	with("http://c-other", proxy...)(other)
	n.api.put(git, other, connector("default", "git", "git", with("http://c-git", proxy...)),
		connector("default", "same", "git", with("http://c-git", proxy...)),
		connector("default", "address", "git", with("http://c-address.default.svc.cluster.local", proxy...)),
		connector("default", "other", "other"))
	v := n.volume(attrs{"connector.name": "-", "connectors": "git,same,address,other"})
	v.mustPublish()
	c, _ := decodeClaims(v.file("token"))
	if want := []string{apiAudience, "http://c-git", "http://c-address.default.svc.cluster.local",
		"http://c-other"}; !slices.Equal(c.Audience, want) {
		t.Errorf("audiences %v, not %v", c.Audience, want)
	}
	if got := valueAt(n.api.lastBody(tokenPath("default", "default")), "spec", "expirationSeconds"); got != 1800. {
		t.Errorf("expirationSeconds is %v", got)
	}

	with("http://moved", "spec", "proxy", "audience")(git)
	n.api.put(git, connector("default", "git", "git", with("http://moved", proxy...)), connector("default", "same", "git"))
	n.age()
	v.mustPublish()
	if c, _ := decodeClaims(v.file("token")); !slices.Contains(c.Audience, "http://moved") ||
		slices.Contains(c.Audience, "http://c-git") {
		t.Errorf("the audience has changed, but the token's are %v", c.Audience)
	}
}

// Whoever writes a Connector's status decides where tokens go. That must not be a way to have them made for another
// service.
func TestAudienceOfSomebodyElse(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	httpAddress := func(fields object) func(object) { return with(fields, "status", "proxy", "httpAddress") }
	for _, c := range []struct {
		what   string
		status func(object)
	}{
		{"another service", httpAddress(object{"url": "http://proxy", "audience": "vault"})},
		{"no proxy", httpAddress(object{"audience": "vault"})},
		{"a part of the proxy's address", httpAddress(object{"url": "http://proxy", "audience": "http://prox"})},
		{"the address in another spelling", httpAddress(object{"url": "http://proxy", "URL": "vault", "audience": "vault"})},
		{"an address that is not used",
			with(object{"proxyAddress": "http://evil",
				"proxy": object{"httpAddress": object{"url": "vault", "audience": "vault"}}}, "status")},
		{"a service that is no URL, as the proxy's address",
			httpAddress(object{"url": "sts.amazonaws.com", "audience": "sts.amazonaws.com"})},
		{"the same as proxyAddress too",
			with(object{"proxyAddress": "vault", "proxy": object{"httpAddress": object{"url": "vault", "audience": "vault"}}},
				"status")},
		{"a word before a colon", httpAddress(object{"url": "istio-ca:80", "audience": "istio-ca:80"})},
		{"a URL of another scheme", httpAddress(object{"url": "spiffe://cluster.local/ns/a",
			"audience": "spiffe://cluster.local/ns/a"})},
		{"a URN", httpAddress(object{"url": "urn:istio-ca", "audience": "urn:istio-ca"})},
		{"http without a host", httpAddress(object{"url": "http:///vault", "audience": "http:///vault"})},
		{"http with a port alone", httpAddress(object{"url": "http://:80", "audience": "http://:80"})},
		{"http with a user alone", httpAddress(object{"url": "http://vault@", "audience": "http://vault@"})},
		{"http as a word", httpAddress(object{"url": "http:vault", "audience": "http:vault"})},
		{"a path", httpAddress(object{"url": "//vault", "audience": "//vault"})},
		{"an address in a list", with(object{"proxy": []any{object{"httpAddress": object{"url": "vault"}},
			object{"httpAddress": object{"audience": "vault"}}}}, "status")},
	} {
		t.Run(c.what, func(t *testing.T) {
			n.api.put(connector("default", "git", "git", c.status))
			v := n.volume()
			v.t = t
			if c.what == "an address in a list" { // which is none, and no audience
				v.attributes["configuration.names"] = "first"
				v.mustPublish()
			} else {
				v.mustRefuse(codes.FailedPrecondition, `Connector "default/git": the audience "`, `ConnectorClass "git"`)
			}
			if got := n.api.count(tokenPath("default", "default")); got != 0 {
				t.Errorf("%d tokens were asked for", got)
			}
		})
	}
}

// renewNow lets the time come at which the driver renews its volume's token by itself.
func (v *podVolume) renewNow() {
	v.t.Helper()
	r := v.record()
	v.node.driver.inTurn(r, func(context.Context) {
		if r.token.renew = time.Now(); r.renewTimer == nil || !r.renewTimer.Reset(0) {
			v.t.Error("no timer is to renew the token")
		}
	})
}

// Kubelet calls no more for a Pod that is ending, or is down: the driver renews a token that it asked for by itself,
// with nothing of the Pod's, whose own token has expired; also where its objects are not watched, and are older than a
// refresh would take.
func TestDriverRenewsItsTokenByItself(t *testing.T) {
	t.Parallel()
	for what, start := range sorted(map[string]func(testing.TB, ...func(*driver)) *node{"watched": startNode,
		"polled": startPolling}) {
		t.Run(what, func(t *testing.T) {
			n := start(t)
			v := n.volume(attrs{"token.expiration": "1h"})
			v.settle()
			if what == "watched" {
				n.awaitWatches(2)
			}
			n.api.endTokens(v.pod)
			n.age()
			token, asked := v.file("token"), n.api.countFromNow("")
			for round := range 2 {
				v.renewNow()
				eventually(t, "the token is renewed", func() bool { return v.file("token") != token })
				token = v.file("token")
				if got := asked(); got != round+1 {
					t.Errorf("%d requests for %d tokens", got, round+1)
				}
				if at := time.Until(v.record().token.renew); at < 47*time.Minute || at > 48*time.Minute {
					t.Errorf("the next is due in %v", at)
				}
			}
			v.wantClean()

			// One that fails is tried again, a minute later, and the volume stays as it is.
			n.api.set(func() { n.api.noTokens = true })
			v.renewNow()
			n.awaitMetric(`connectors_csi_pushes_total{code="PermissionDenied"}`, 1)
			v.want("token", token)
			n.api.set(func() { n.api.noTokens = false })
			v.renewNow()
			eventually(t, "the token is renewed", func() bool { return v.file("token") != token })
			v.mustUnpublish()
			n.wantForgotten()
		})
	}
}

// The driver renews nothing for a volume that is gone, nor for one that has kubelet's token.
func TestNothingIsRenewedForNobody(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	v, other := n.volume(attrs{"token.expiration": "1h"}), n.volume()
	v.mustPublish()
	other.mustPublish()
	if other.record().renewTimer != nil {
		t.Error("kubelet's token is to be renewed")
	}
	r, asked := v.record(), n.api.countFromNow("")
	v.mustUnpublish()
	if r.renewTimer.Stop() {
		t.Error("the token of a volume that is gone was to be renewed")
	}
	n.driver.push(r, true) // by a timer at that moment
	v.wantNothing()
	if asked() != 0 || len(n.driver.volumes) != 1 {
		t.Errorf("%d requests for a volume that is gone, %d volumes", asked(), len(n.driver.volumes))
	}

	// Since the Connector wants no audience any more, the token is kubelet's.
	proxy := []string{"status", "proxy", "httpAddress", "audience"}
	n.api.put(connector("default", "git", "git", with("http://c-git.default.svc.cluster.local", proxy...)))
	n.age()
	w := n.volume()
	w.mustPublish()
	if w.file("token") == w.pod.token || w.record().renewTimer == nil {
		t.Fatal("it has kubelet's token")
	}
	n.api.put(connector("default", "git", "git"))
	n.age()
	w.mustPublish()
	w.want("token", w.pod.token)
	asked = n.api.countFromNow("")
	n.driver.push(w.record(), true)
	w.want("token", w.pod.token)
	if w.record().token.value != "" || asked() != 0 {
		t.Errorf("the driver keeps a token, and has made %d requests", asked())
	}
}

// A call of kubelet that comes while the driver renews a token does it in its place; an unpublish ends it.
func TestCallsDuringARenewal(t *testing.T) {
	t.Parallel()
	for what, call := range sorted(map[string]func(*podVolume) error{
		"publish":   (*podVolume).publish,
		"unpublish": (*podVolume).unpublish,
	}) {
		t.Run(what, func(t *testing.T) {
			n := startPolling(t)
			v := n.volume(attrs{"token.expiration": "1h"})
			v.settle()
			token, path := v.file("token"), tokenPath("default", "default")
			gate := n.api.hold("/token")
			v.renewNow()
			gate.await(1, "the token is asked for")
			result, log := make(chan error), n.logFromNow()
			go func() { result <- call(v) }()
			if what == "publish" {
				eventually(t, "the call asks as well", func() bool { return n.api.count(path) == 3 })
			}
			gate.open()
			must(t, <-result)
			if strings.Contains(log(), "level=ERROR") {
				t.Errorf("the log has an error: %s", log())
			}
			if what == "unpublish" {
				v.wantNothing()
				n.wantForgotten()
				return
			}
			if v.file("token") == token {
				t.Error("the token was not renewed")
			}
			if at := time.Until(v.record().token.renew); at < 47*time.Minute {
				t.Errorf("the next is due in %v", at)
			}
		})
	}
}

// ---- Whoever may read ----

// One of two ServiceAccounts loses the right between two versions: it is given the new one by nobody else's read, at no
// moment, and the other goes on. Both orders, and with a read of the one that is still under way.
func TestReaderIsGivenWhatItWasGiven(t *testing.T) {
	t.Parallel()
	n := startPolling(t)
	a, b := n.volume(), n.pod("default/builder").volume("config")
	a.settle()
	b.settle()
	versions := func() (of map[string]string) {
		of = map[string]string{}
		n.eachEntry(func(e *entry) {
			if e.path == gitPath && e.object != nil {
				of[e.reader] = stringAt(decoded(e.object.raw), "spec", "address")
			}
		})
		return of
	}
	n.api.forbid("default/builder", gitPath)
	n.api.put(moved("git", "second"))
	n.age()
	a.mustPublish() // reads the second version
	b.pod.renewToken()
	wantError(t, b.publish(), codes.PermissionDenied, "may not read")
	wantError(t, n.pod("default/builder").volume("config").publish(), codes.PermissionDenied, "may not read")
	if of := versions(); of["default/default"] != "https://second" || of["default/builder"] == "https://second" {
		t.Errorf("the readers were given %v", of)
	}
	if strings.Contains(b.file(".gitconfig"), "second") {
		t.Error("it has what it may not read")
	}

	// A read of the one that began before the right was lost, and ends after the other's newer read.
	n.api.allow("default/builder", gitPath)
	n.age()
	b.settle()
	gate := make(chan bool)
	var old []byte
	n.api.set(func() {
		old = n.api.objects[gitPath]
		n.api.intercept = func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Path != gitPath || !strings.Contains(r.Header.Get("Authorization"), b.pod.token) {
				return false
			}
			<-gate
			w.Write(old)
			return true
		}
	})
	n.age()
	result := make(chan error)
	asked := n.api.countFromNow(gitPath)
	go func() { result <- b.publish() }()
	eventually(t, "it reads", func() bool { return asked() == 1 })
	n.api.forbid("default/builder", gitPath)
	n.api.put(moved("git", "third"))
	n.age()
	a.mustPublish()
	gate <- true
	must(t, <-result) // with what it was given
	if of := versions(); of["default/default"] != "https://third" || of["default/builder"] != "https://second" {
		t.Errorf("the readers were given %v", of)
	}
	n.api.set(func() { n.api.intercept = nil })
	wantError(t, b.publish(), codes.PermissionDenied, "may not read") // since a newer version is known
	b.await(".gitconfig", "https://second")
}

// The streams that the driver has with its own token count for no namespace, and have a number of their own.
func TestDriversStreamsCountForNoNamespace(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	v := n.watchedVolume()
	k := n.driver.kube
	streams := func() (of map[string]int) {
		n.locked(func() { of = maps.Clone(k.watches) })
		return of
	}
	if got := streams(); !maps.Equal(got, map[string]int{"": 1, "default": 1}) {
		t.Errorf("streams %v", got)
	}
	n.locked(func() { k.watches[""] += maxOwnWatches - 1 })
	n.api.put(class("other", configuration("config", "file", "x")), connector("default", "other", "other"))
	w := n.volume(attrs{"connector.name": "other"})
	w.settle()
	if got := streams(); got["default"] != 2 || got[""] != maxOwnWatches {
		t.Errorf("streams %v", got)
	}
	n.locked(func() {
		k.watches[""] -= maxOwnWatches - 1
		k.watches["default"] += maxNamespaceWatches - 2
	})
	w.settle() // its class is watched now
	n.api.put(connector("default", "more", "other"))
	more := n.volume(attrs{"connector.name": "more"})
	more.settle()
	if got := streams(); got["default"] != maxNamespaceWatches || got[""] != 2 {
		t.Errorf("streams %v", got)
	}
	n.locked(func() { k.watches["default"] -= maxNamespaceWatches - 2 })
	for _, v := range []*podVolume{v, w, more} {
		v.mustUnpublish()
	}
	n.wantForgotten()
	if got := streams(); len(got) != 0 {
		t.Errorf("streams %v are left", got)
	}
}
