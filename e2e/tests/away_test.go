package tests

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"connectors-csi/e2e/cluster"
)

// The API server is away for five minutes, in which the Connector changes in etcd: its return alone, without kubelet,
// brings the change to the file.
func TestChangesArriveAfterFiveMinutesWithoutTheAPIServer(t *testing.T) {
	const away, back = 5 * time.Minute, 35 * time.Second // a broken watch is opened again within 30 s
	release := processors(t, unix.LOCK_SH)
	installDriver(t)
	ns := newNamespace(t)
	ns.target("away", map[string]string{"address": "{{ .connector.spec.address }}"})
	ns.watcher("pod")
	uid := ns.uid("pod")
	mount, file := ns.wantOneMount(uid), cluster.VolumeDir(uid, "volume")+"/address"

	theNode.APIServer.Stop()
	changed := changeInEtcd("/registry/connectors.alauda.io/connectors/"+ns.name+"/target", "https://one.", "https://two.")
	release()
	time.Sleep(away) // what is tried, and what nothing but the driver's attempts is done in
	processors(t, unix.LOCK_EX)
	kept, err := os.ReadFile(file)
	theNode.Kubelet.Stop()
	theNode.APIServer = theNode.Restart(theNode.APIServer)
	ready := cluster.Await(limit, func() error {
		_, err := cluster.Kubectl("get", "--raw", "/readyz")
		return err
	})
	returned := time.Now()
	arrived := cluster.Await(limit, func() error {
		address, err := os.ReadFile(file)
		if err == nil && string(address) != "https://two.example.com" {
			err = fmt.Errorf("the address is %q", address)
		}
		return err
	})
	took := time.Since(returned)
	theNode.Kubelet = theNode.Restart(theNode.Kubelet) // before anything can end the test: the others need it
	if err := errors.Join(changed, err, ready, arrived); err != nil {
		t.Fatal(err)
	}
	if string(kept) != "https://one.example.com" {
		t.Errorf("without an API server the address is %q", kept)
	}
	t.Logf("the change is in the file %v after the API server's return", took.Round(100*time.Millisecond))
	if took > back {
		t.Errorf("that took longer than %v", back)
	}
	ns.eventually(func() error { return ns.has("pod", "/volume/address", "https://two.example.com") })
	ns.wantNoMiss("pod")
	ns.wantSameMount(uid, mount)
}

// changeInEtcd replaces a text in a custom resource, which the API server keeps as JSON.
func changeInEtcd(key, before, after string) error {
	var answer struct {
		KVs []struct{ Value []byte } `json:"kvs"`
	}
	if err := askEtcd("range", map[string][]byte{"key": []byte(key)}, &answer); err != nil {
		return err
	}
	if len(answer.KVs) != 1 || !bytes.Contains(answer.KVs[0].Value, []byte(before)) {
		return fmt.Errorf("etcd has no %s with %q", key, before)
	}
	value := bytes.ReplaceAll(answer.KVs[0].Value, []byte(before), []byte(after))
	return askEtcd("put", map[string][]byte{"key": []byte(key), "value": value}, nil)
}

// askEtcd sends a request to etcd's JSON gateway.
func askEtcd(method string, request, answer any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return err
	}
	response, err := http.Post("http://127.0.0.1:2379/v3/kv/"+method, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("etcd: %s: %s", method, response.Status)
	}
	if answer == nil {
		return nil
	}
	return json.NewDecoder(response.Body).Decode(answer)
}
