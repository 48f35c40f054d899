package node

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"connectors-csi/e2e/image"
)

// writeConfiguration writes the components' configuration into the node's directory.
func (n *Node) writeConfiguration() error {
	key, err := newKey()
	if err != nil {
		return err
	}
	var tokens strings.Builder
	for _, user := range []struct{ file, name, groups string }{
		{"admin", "admin", "system:masters"},
		{"controller-manager", "system:kube-controller-manager", ""},
		{"scheduler", "system:kube-scheduler", ""},
		{"kubelet", "system:node:" + Name, "system:nodes"},
		{"kube-proxy", "system:kube-proxy", ""},
	} {
		token := rand.Text()
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", token, user.name, user.name, user.groups)
		if err := os.WriteFile(n.Path(user.file+".kubeconfig"), n.Kubeconfig(token), 0o600); err != nil {
			return err
		}
	}
	for _, file := range []struct{ name, content string }{
		{"tokens.csv", tokens.String()},
		{"service-account.key", key},
		{"kubelet.yaml", fmt.Sprintf(kubeletFormat, filepath.Base(n.Dir), n.Path("pods"), dnsServiceIP)},
		{"Corefile", fmt.Sprintf(corefileFormat, IP, n.Path("admin.kubeconfig"), n.Path("zone"))},
		{"resolv.conf", "nameserver " + dnsServiceIP + "\n"},
		{"containerd.toml", fmt.Sprintf(containerdFormat, image.Pause, n.Path("bin"), n.Path("cni"), n.Path("bin"))},
		{"cni/node.conflist", fmt.Sprintf(cniFormat, bridge, podNetwork, firstPodIP)},
	} {
		if err := os.MkdirAll(filepath.Dir(n.Path(file.name)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.Path(file.name), []byte(file.content), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// Kubeconfig is one for the bearer of a token.
func (n *Node) Kubeconfig(token string) []byte {
	return fmt.Appendf(nil, kubeconfigFormat, IP, n.Path("apiserver.crt"), token)
}

// newKey returns a new private key, PEM-encoded, to sign ServiceAccounts' tokens with.
func newKey() (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return "", err
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})), nil
}

const kubeconfigFormat = `apiVersion: v1
kind: Config
current-context: node
contexts: [{name: node, context: {cluster: node, user: user}}]
clusters: [{name: node, cluster: {server: "https://%s:443", certificate-authority: %q}}]
users: [{name: user, user: {token: %q}}]
`

// The API server reaches the kubelet for logs and exec without credentials; nobody else can reach it.
// Kubelet republishes volumes when it syncs a Pod: with the default of 1m the tests would wait for most of
// their time. Disk limits are off because the node's disk is memory.
const kubeletFormat = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /%s
failCgroupV1: false
failSwapOn: false
evictionHard: {memory.available: 50Mi, nodefs.available: 1%%, nodefs.inodesFree: 1%%, imagefs.available: 1%%}
maxPods: 240
podLogsDir: %s
resolvConf: ""
clusterDNS: [%s]
clusterDomain: cluster.local
syncFrequency: 5s
`

// restrict_oom_score_adj: without CAP_SYS_RESOURCE, which containers and some machines lack, a lower
// score than containerd's own can't be set and no Pod would start. root: not in the state directory,
// /run/containerd, which would be created for it with access for root only, and not with the passage that Pods in a
// user namespace of their own need.
const containerdFormat = `version = 3
root = "/run/containerd-root"

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = %q

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [%q]
conf_dir = %q
use_internal_loopback = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = "%s/runc"
SystemdCgroup = false
`

const cniFormat = `{
  "cniVersion": "0.4.0",
  "name": "node",
  "plugins": [{
    "type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": false,
    "ipam": {
      "type": "host-local", "dataDir": "/run/cni",
      "ranges": [[{"subnet": %q, "rangeStart": %q}]],
      "routes": [{"dst": "0.0.0.0/0"}]
    }
  }]
}
`
