package tests

import (
	"strings"
	"sync"
	"testing"
	"time"
)

// A test runs alone on its node, unless it begins with beside. What stops a component, changes what belongs to no
// namespace, or measures something, runs alone.

// atOnce is how many tests run side by side: most of their time they wait for kubelet.
const atOnce = 6

// side lets those tests run side by side that want the same of the driver.
var side = struct {
	sync.Mutex
	changed *sync.Cond
	args    string         // the driver's, at the moment
	running int            // tests
	waiting map[string]int // tests by the arguments that they want
}{waiting: map[string]int{}}

func init() { side.changed = sync.NewCond(&side) }

// beside is begin for a test that runs side by side with others, after all that run alone.
func beside(t *testing.T, driverArgs ...string) namespace {
	t.Helper()
	t.Parallel()
	enter(t, driverArgs)
	began := time.Now()
	t.Cleanup(func() {
		t.Logf("of its time, %v were not spent waiting for its turn", time.Since(began).Round(100*time.Millisecond))
		side.Lock()
		defer side.Unlock()
		side.running--
		side.changed.Broadcast()
	})
	unmeasured(t)
	return newNamespace(t)
}

// enter waits until a test may run. Whoever comes first installs the driver as all want it who come until nobody is left
// that does.
func enter(t *testing.T, driverArgs []string) {
	t.Helper()
	args := strings.Join(driverArgs, " ")
	side.Lock()
	defer side.Unlock()
	side.waiting[args]++
	for side.running == atOnce || side.args != args && side.running+side.waiting[side.args] > 0 {
		side.changed.Wait()
	}
	side.waiting[args]--
	side.args = args
	if side.running == 0 {
		release := unmeasured(t)
		installDriver(t, driverArgs...)
		release()
	}
	side.running++
}
