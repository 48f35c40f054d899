package tests

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	authentication "k8s.io/api/authentication/v1"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"

	"connectors-csi/e2e/cluster"
	"connectors-csi/e2e/image"
)

// Other clients' requests are not looked at by the policy with parameters, neither where there are none nor where there
// are many.
func TestOthersDoNotPayForTheTokenPolicies(t *testing.T) {
	ns := measured(t)
	empty := newNamespace(t)
	elsewhere := elsewhere(t)
	away := ns.barePod("away", "default", true)
	driver, client := clientWith(t, elsewhere, ""), admin(t)
	const pods, requests = 1000, 61
	var group errgroup.Group
	group.SetLimit(8)
	for i := 1; i < pods; i++ {
		group.Go(func() error {
			pod := &core.Pod{ObjectMeta: meta.ObjectMeta{Name: fmt.Sprintf("pod-%d", i)}, Spec: core.PodSpec{
				SchedulingGates: []core.PodSchedulingGate{{Name: "example.com/never"}},
				Containers:      []core.Container{{Name: "main", Image: image.Client}},
			}}
			_, err := client.CoreV1().Pods(ns.name).Create(context.Background(), pod, meta.CreateOptions{})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	median := func(requests int, request func() error) time.Duration {
		t.Helper()
		var took []time.Duration
		for range requests {
			began := time.Now()
			if err := request(); err != nil {
				t.Fatal(err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	// others measures an unrelated client's request in both namespaces.
	others := func() (none, many time.Duration) {
		t.Helper()
		unrelated := func(in namespace) func() error {
			return func() error {
				accounts := client.CoreV1().ServiceAccounts(in.name)
				_, err := accounts.CreateToken(context.Background(), "default", new(authentication.TokenRequest),
					meta.CreateOptions{})
				return err
			}
		}
		return median(requests, unrelated(empty)), median(requests, unrelated(ns))
	}
	drivers := func() error { return ask(driver, away) }

	ns.eventually(drivers)
	first, second := passedOver(t, firstPolicy), passedOver(t, secondPolicy)
	none, many := others()
	if more := passedOver(t, firstPolicy) - first; more < 2*requests {
		t.Errorf("the policy without parameters looked at %d of others' requests, not at all %d", more, 2*requests)
	}
	if more := passedOver(t, secondPolicy) - second; more != 0 {
		t.Errorf("the policy with parameters looked %d times at others' requests", more)
	}
	own := median(11, drivers)

	ns.kubectl("delete", "validatingadmissionpolicybinding", firstPolicy, secondPolicy)
	ns.eventually(func() error { return ask(driver, away, lifetime(48*time.Hour)) }) // they are gone
	noneWithout, manyWithout := others()
	ownWithout := median(11, drivers)
	applyDriver(t)
	ns.wantDenied(deniedLifetime, func() error { return ask(driver, away, lifetime(48*time.Hour)) })
	noneAgain, manyAgain := others()
	t.Logf("medians of requests, with the policies, without them, with them: of others in a namespace without Pods %v, %v, %v, "+
		"in one of %d %v, %v, %v; of the driver there %v, %v", none, noneWithout, noneAgain, pods, many, manyWithout,
		manyAgain, own, ownWithout)

	const noise = 5 * time.Millisecond // without the selector it is 50 ms and more
	for what, took := range sorted(map[string][2]time.Duration{
		"without Pods": {min(none, noneAgain), noneWithout}, "of many Pods": {min(many, manyAgain), manyWithout},
	}) {
		if took[0] > 2*took[1]+noise {
			t.Errorf("an unrelated client's request in a namespace %s takes %v, and %v without the policies", what, took[0],
				took[1])
		}
	}
}

// passedOver returns how often the API server has asked the conditions of a policy in vain: once for each request that
// its selectors let pass, and for each of its parameters.
func passedOver(t *testing.T, policy string) (count int) {
	t.Helper()
	page, err := cluster.Kubectl("get", "--raw", "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	pattern := regexp.MustCompile(`(?m)^apiserver_admission_match_condition_evaluation_seconds_count\{.*name="` + policy + `".*\} (\d+)$`)
	if found := pattern.FindStringSubmatch(page); found != nil {
		if count, err = strconv.Atoi(found[1]); err != nil {
			t.Fatal(err)
		}
	}
	return count
}
