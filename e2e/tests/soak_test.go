package tests

import (
	"testing"
	"time"

	"connectors-csi/e2e/soak"
)

// Two minutes of bad days: see the package soak. The next test installs the driver with its own limits again.
func TestSoakOfTwoMinutes(t *testing.T) {
	unmeasured(t)
	if err := soak.Run(theNode, 2*time.Minute, 1); err != nil {
		t.Error(err)
	}
}
