package kernels

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestNamedTestsExist(t *testing.T) {
	if err := checkNames("../.."); err != nil {
		t.Error(err)
	}
	if err := checkNames(t.TempDir()); err == nil || !strings.Contains(err.Error(), named[0]+", "+named[1]) {
		t.Errorf("where there are none: %v", err)
	}
	for _, b := range boots {
		for _, test := range b.without {
			if !slices.Contains(named, test) {
				t.Errorf("%v goes without %s, which is not named", b, test)
			}
		}
	}
}

// good is the console of a boot where everything is as it is to be.
func (b boot) good(tests []string) string {
	console := "kernels: Linux " + b.release + ".0-1\n"
	if b.refuses {
		return console + "connectors-csi: this kernel is too old: Linux 5.12 or later is needed (function not implemented)\n" +
			"kernels: the driver ended with 1\n"
	}
	console += "connectors-csi: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the driver runs in a Pod only\n" +
		"kernels: the driver ended with 1\n"
	options := "rw,mode=700"
	if b.noswap {
		options += ",noswap"
	}
	for _, test := range tests {
		console += "=== RUN   " + test + "\n    x_test.go:1: something\n--- PASS: " + test + " (0.10s)\n    --- PASS: " + test + "/part (0.10s)\n"
	}
	return console + fmt.Sprintf("    x_test.go:1: renderers lack %q\n    x_test.go:2: the tmpfs has the options %s\n", b.lacks, options) +
		"    x_test.go:3: 5 KiB are charged for a volume, and 7 KiB counted\nPASS\nkernels: the tests ended with 0\n"
}

func TestVerdicts(t *testing.T) {
	for _, b := range boots {
		if o := b.judge(b.good(b.tests()), b.tests()); len(o.problems) > 0 || o.release != b.release+".0-1" || o.passed != len(b.tests()) && !b.refuses {
			t.Errorf("%v: %+v", b, o)
		}
	}
	old, b := boots[0], boots[1]
	tests := []string{"TestOne", "TestTwo"}
	for what, c := range map[string]struct {
		b       boot
		change  []string // pairs of what is replaced, and by what
		problem string
	}{
		"a panic":               {b, []string{"=== RUN   TestTwo", "[ 1.2] Kernel panic - not syncing: VFS\x00"}, "the kernel panicked: Kernel panic - not syncing: VFS"},
		"no driver":             {b, []string{"kernels: the driver", "x"}, "the driver was not started, or has not ended"},
		"it refuses":            {b, []string{"KUBERNETES_SERVICE_HOST", "this kernel is too old"}, "the driver has not said"},
		"it says more":          {b, []string{"kernels: the driver", "more\nkernels: the driver"}, "the driver has not said"},
		"another exit code":     {b, []string{"the driver ended with 1", "the driver ended with 2"}, "and ended with 2"},
		"it says nothing":       {b, []string{"connectors-csi: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set: the driver runs in a Pod only\n", ""}, `but said ""`},
		"an old one starts":     {old, []string{"this kernel is too old", "started"}, "the driver has not said"},
		"an old one and 0":      {old, []string{"ended with 1", "ended with 0"}, "and ended with 0"},
		"a failing test":        {b, []string{"--- PASS: TestTwo ", "--- FAIL: TestTwo "}, "TestTwo failed"},
		"a skipped test":        {b, []string{"--- PASS: TestTwo ", "--- SKIP: TestTwo "}, "TestTwo was skipped"},
		"no such test":          {b, []string{"--- PASS: TestTwo ", "--- PASS: TestThree "}, "TestTwo was not run"},
		"only a part of it":     {b, []string{"--- PASS: TestTwo (", "    --- PASS: TestTwo/part ("}, "TestTwo was not run"},
		"the tests' exit code":  {b, []string{"tests ended with 0", "tests ended with 2"}, "the tests ended with 2"},
		"no end of the tests":   {b, []string{"kernels: the tests", "x"}, "the tests have not ended"},
		"renderers lack":        {b, []string{`lack ""`, `lack "namespaces"`}, `renderers lack "namespaces", and not ""`},
		"nobody says what":      {b, []string{"renderers lack", "x"}, "no test has logged"},
		"noswap is not there":   {boots[2], []string{",noswap", ""}, "a volume's tmpfs has the options rw,mode=700"},
		"noswap is there":       {b, []string{"mode=700", "mode=700,noswap"}, "a volume's tmpfs has the options rw,mode=700,noswap"},
		"nothing has been said": {b, []string{b.good(tests), ""}, "the driver was not started"},
	} {
		console := strings.NewReplacer(c.change...).Replace(c.b.good(tests))
		if o := c.b.judge(console, tests); !strings.Contains(strings.Join(o.problems, "\n"), c.problem) {
			t.Errorf("%s: %q", what, o.problems)
		}
	}
}
